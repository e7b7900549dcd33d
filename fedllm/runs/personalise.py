"""A model for a client that took no part in the run: its personal part, trained on its own records.

    start     what the method gives a newcomer; the shared part as the server has it
    trains    the tensors of the personal part, by the run's own work; every other tensor stays as it is, to the bit
    leaves    RUN/clients/NAME: an adapter in PEFT's layout, which chat, eval and export find by its name

Collins et al. 2021 (FedRep), arXiv:2102.07078: a new client takes the shared representation and trains its
own head alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedllm.data.heldout import hold_out
from fedllm.data.lazy_records import open_records
from fedllm.engines.client_noise import RoundStreams
from fedllm.engines.client_store import require_folder_name
from fedllm.errors import ConfigError, DataError, Record, RunError, nearest
from fedllm.evaluation.scores import Scorer
from fedllm.experiment.config_file import build
from fedllm.experiment.record import Experiment
from fedllm.messages.context import Profile, RoundContext
from fedllm.models.batch import Example
from fedllm.privacy.noise import new_key
from fedllm.runs.folder import Folder
from fedllm.runs.loaded_run import LoadedRun, open_run
from fedllm.runs.personal_files import personalised, run_clients, save_personal
from fedllm.stages.round_trip import has_personal
from fedllm.tensors.tree import Tree, add, matches
from fedllm.training.base import ClientJob, run_steps

HELDOUT = 0.1  # of the records, where the run does not name a fraction itself


@dataclass(frozen=True)
class Newcomer:
    """Who comes, and with what.

    Args:
        name: under which chat, eval and export find the model. data: a source of records, as `federation.shards.data`.
        fields: as `federation.shards.fields`; None: the run's. steps: local steps; None: as many as a client of the run
            takes in all its rounds. lr: learning rate; None: the run's. heldout: fraction of the records that is not
            trained on; None: the run's, or a tenth.
    """

    name: str
    data: str
    fields: Mapping[str, str] | None = None
    steps: int | None = None
    lr: float | None = None
    heldout: float | None = None

    def __post_init__(self) -> None:
        require_folder_name(self.name)
        if self.heldout is not None and not 0 <= self.heldout < 1:
            raise ConfigError(f"--heldout is {self.heldout}; a fraction must be 0 or more and below 1")
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"--steps is {self.steps}; it must be 1 or more")


@dataclass(frozen=True)
class Personalised:
    """What came of it. `before`, `after`: figures on the newcomer's held-out records, if it has any."""

    folder: Path
    tensors: int
    trained: int
    heldout: int
    before: Mapping[str, float]
    after: Mapping[str, float]


def personalise(path: Path, newcomer: Newcomer) -> Personalised:
    """Train a newcomer's personal part and write it into the run folder.

    Raises:
        RunError: no run there, nothing personal in its method, or the name is taken.
        DataError: records that are not there, or lack a field.
        ConfigError: a setting that cannot be right.
    """
    folder = Folder(path)
    experiment = build(folder.read_experiment())
    _require_new(folder, experiment, newcomer.name)
    train, heldout = _records(experiment, newcomer)
    opened = open_run(path)
    own = opened.own_of(newcomer.name)
    moving = _moving(experiment, own)
    if not moving:
        raise RunError(f"nothing of the personal part trains in {path}: task.scope freezes or holds all of it")
    examples = _examples(opened, train, newcomer)
    trained = _trained(opened, own, moving, examples, newcomer)
    scorer = Scorer(replace(experiment.evaluation, by=None), experiment.work.max_length)
    before, after = (
        scorer.figures(scorer.sums(opened.model, {**opened.params, **part}, heldout)) if heldout else {}
        for part in (own, trained)
    )
    facts = {"data": newcomer.data, "fields": _fields(experiment, newcomer), "records": len(train) + len(heldout),
             "heldout": _fraction(experiment, newcomer), "steps": newcomer.steps, "lr": newcomer.lr,
             "round": opened.state.round, "digest": _digest(train, heldout),
             "before": before, "after": after}  # fmt: skip
    save_personal(folder, newcomer.name, opened.model, {**opened.params, **trained}, trained, facts)
    place = folder.clients / newcomer.name
    return Personalised(place, len(moving), len(examples), len(heldout), before, after)


def held_out_of(experiment: Experiment, facts: Mapping[str, Any], name: str) -> Sequence[Record]:
    """The records that a newcomer did not train on, read from its file again.

    Raises:
        DataError: the file is no longer there, or another one.
    """
    known = Newcomer(name, facts["data"], fields=facts["fields"], heldout=facts["heldout"])
    train, heldout = _records(experiment, known)
    if _digest(train, heldout) != facts["digest"]:
        raise DataError(
            f"{known.data} has changed since {name} was made from it; put it back as it was, or make {name} again with "
            "fedllm personalise"
        )
    return heldout


def _digest(*sides: Sequence[Record]) -> str:
    """A hash of records."""
    return hashlib.sha256(json.dumps([list(side) for side in sides], default=str).encode()).hexdigest()


def _require_new(folder: Folder, experiment: Experiment, name: str) -> None:
    if not has_personal(experiment.pipeline):
        raise RunError(
            f"{folder.path} has no personal part to train: its method shares every tensor that trains; train with one "
            "that keeps some on the clients, such as method: fedsa_lora or task.scope.share"
        )
    if name in run_clients(folder):
        raise RunError(f"'{name}' is a client of {folder.path} and has its own model already; choose another --name")
    if name in personalised(folder) or (folder.clients / name).exists():
        raise RunError(
            f"{folder.clients / name} is there already; choose another --name, or delete that folder to train it again"
        )


def _fields(experiment: Experiment, newcomer: Newcomer) -> dict[str, str]:
    given = getattr(experiment.federation, "fields", {}) if newcomer.fields is None else newcomer.fields
    return dict(given)


def _fraction(experiment: Experiment, newcomer: Newcomer) -> float:
    known = getattr(experiment.federation, "heldout", None)
    return newcomer.heldout if newcomer.heldout is not None else known if isinstance(known, float) else HELDOUT


def _records(experiment: Experiment, newcomer: Newcomer) -> tuple[list[Record], list[Record]]:
    """To train on, and held out."""
    records = open_records(newcomer.data, fields=_fields(experiment, newcomer))
    key = experiment.key.fold("heldout", newcomer.name)
    return hold_out(records, fraction=_fraction(experiment, newcomer), key=key)


def _moving(experiment: Experiment, own: Tree) -> list[str]:
    """Of the personal part, the tensors that train: those that take turns do so all at once."""
    scope = experiment.task.scope
    return [name for name in own if scope.trains(name) and not matches(name, scope.hold)]


def _examples(opened: LoadedRun, train: Sequence[Record], newcomer: Newcomer) -> list[Example]:
    length = opened.experiment.work.max_length
    examples = [example for example in opened.model.encode_all(train, length) if example is not None]
    if not examples:
        raise RunError(f"no record of {newcomer.data} keeps a target token in {length} tokens, the work's max_length")
    return examples


def _trained(
    opened: LoadedRun, own: Tree, moving: Sequence[str], examples: Sequence[Example], newcomer: Newcomer
) -> Tree:
    """The personal part after the local steps.

    Raises:
        RunError: it became not finite.
    """
    experiment, device = opened.experiment, opened.model.device
    model = opened.model.with_constants(experiment.key).with_base_delta(opened.state.base_delta)
    whole = {**opened.shared, **own}
    start = {name: whole[name].to(device) for name in moving}
    frozen = {name: leaf.to(device) for name, leaf in whole.items() if name not in start}
    profile = Profile(steps=newcomer.steps, lr=newcomer.lr)
    rounds = experiment.rounds if newcomer.steps is None else 1
    ctx = RoundContext(0, experiment.key, 1, 1, rounds, client=newcomer.name, profile=profile)
    job, secret = ClientJob(ctx, start, examples, frozen=frozen), new_key()
    carry = experiment.work.init([job])
    for round in range(rounds):
        now = replace(ctx, round=round)
        carry = run_steps(experiment.work, [replace(job, ctx=now, noise=RoundStreams(secret, now))], model, carry)
    (outcome,) = experiment.work.finish(carry)
    if isinstance(outcome, str):
        raise RunError(f"the personal part of {newcomer.name} was not trained: {outcome}")
    moved = add(job.initial, outcome[0].parts["delta"].tree)
    return {**own, **{name: moved[name].cpu() for name in moving}}


def fields_of(texts: Sequence[str]) -> dict[str, str] | None:
    """`prompt=question` for each field that is named otherwise in the file; None where none is.

    Raises:
        ConfigError: something else than NAME=FIELD, or an unknown name.
    """
    known = ("prompt", "response", "text", "system", "messages", "choices", "answer")
    made: dict[str, str] = {}
    for text in texts:
        name, split, source = text.partition("=")
        if not split or not source:
            raise ConfigError(f"--fields: '{text}' is not NAME=FIELD, as in prompt=question")
        if name not in known:
            raise ConfigError(f"--fields: unknown name '{name}'{nearest(name, known)}")
        made[name] = source
    return made or None
