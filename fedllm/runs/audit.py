"""An audit: attacks on a finished run, with what they reach and what it would be by chance."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedllm.errors import RunError, not_written
from fedllm.evaluation.audits.intervals import Floats, Interval, auc, true_positives
from fedllm.evaluation.audits.membership import blind_scores, model_scores
from fedllm.files import to_json_text
from fedllm.models.batch import Example
from fedllm.rng import Key
from fedllm.runs.folder import write_whole
from fedllm.runs.loaded_run import LoadedRun, open_run
from fedllm.tensors.tree import Tree

Member = tuple[str, Example]  # whose record it is
Side = list[Member]

LEAST, MOST = 20, 400  # records of a side
RATE = 0.01


@dataclass(frozen=True)
class Finding:
    """What one attack reaches. `at_one_percent`: the share of members that it finds while it takes one of a hundred
    others for one; None: there are too few others to tell."""

    attack: str
    auc: Interval
    at_one_percent: Interval | None


@dataclass(frozen=True)
class Audit:
    """What the attacks reach. `members`, `others`: records of each side; `duplicates`: texts
    that were on both, and are left out. `biased`: they can be told apart without the
    model, so that the other figures say nothing. `claimed`: epsilon that the run promises, if it does."""

    findings: tuple[Finding, ...]
    members: int
    others: int
    duplicates: int
    biased: bool
    claimed: float | None


def audit(folder: Path, *, records: int = MOST, note: Callable[[str], None] = lambda text: None) -> Audit:
    """Ask of a run's model which records it was trained on: its clients' training records against those held out.

    Args:
        records: of each side, drawn at random. note: is told what is done.

    Raises:
        RunError: no such run, or too few records for an interval.
    """
    opened = open_run(folder)
    note("reading the records")
    sides, duplicates = _sides(opened, records)
    for name, side in zip(("that were trained on", "that were held out"), sides, strict=True):
        if len(side) < LEAST:
            raise RunError(
                f"{folder} has {len(side)} records {name}, and an interval needs {LEAST}; run it with more records, or "
                "with a larger federation.shards.heldout"
            )
    scores = [_scored(opened, side, note) for side in sides]
    findings = [_finding(name, scores[0][name], scores[1][name]) for name in scores[0]]
    blind = _finding("blind", *blind_scores(*([_text(opened, example) for _, example in side] for side in sides)))
    summary = opened.folder.read_summary()
    return Audit(
        findings=(*findings, blind),
        members=len(sides[0]),
        others=len(sides[1]),
        duplicates=duplicates,
        biased=not blind.auc.low <= 0.5 <= blind.auc.high,
        claimed=summary.get("epsilon"),
    )


def write(folder: Path, found: Audit) -> Path:
    """`audit.json` of the run's folder.

    Raises:
        RunError: the disk.
    """
    return write_file(folder / "audit.json", as_json(found))


def write_file(path: Path, facts: Mapping[str, Any]) -> Path:
    """A file of the run's folder.

    Raises:
        RunError: the disk.
    """
    try:
        write_whole(path, to_json_text(facts, indent=2) + "\n")
    except OSError as error:
        raise not_written(path, error) from error
    return path


def as_json(found: Audit) -> Mapping[str, Any]:
    """Plain values."""
    plain: Mapping[str, Any] = json.loads(json.dumps(asdict(found)))
    return plain


def _sides(opened: LoadedRun, records: int) -> tuple[tuple[Side, Side], int]:
    """Members and others, at most so many of each; and how many texts were on both sides, which then belong to neither:
    left out of one alone, what remains there would be the unusual ones."""
    population = opened.experiment.federation.load(opened.experiment.key)
    members, others = _examples(opened, population.train), _examples(opened, population.heldout)
    both = members.keys() & others.keys()
    key = Key(0).fold("audit")
    chosen = (_drawn(members, both, records, key.fold("members")), _drawn(others, both, records, key.fold("others")))
    return chosen, len(both)


def _examples(opened: LoadedRun, records: Mapping[str, Sequence[Any]]) -> dict[bytes, Member]:
    """By text; of equal ones the first."""
    found: dict[bytes, Member] = {}
    for client, own in records.items():
        for example in opened.model.encode_all(own, opened.experiment.work.max_length):
            if example is not None:
                found.setdefault(example.tokens.numpy().tobytes(), (client, example))
    return found


def _drawn(known: Mapping[bytes, Member], left_out: Collection[bytes], count: int, key: Key) -> Side:
    kept = [member for text, member in known.items() if text not in left_out]
    places = torch.randperm(len(kept), generator=key.generator())[:count].tolist()
    return [kept[place] for place in sorted(places)]


def _scored(opened: LoadedRun, side: Side, note: Callable[[str], None]) -> dict[str, Floats]:
    """Each record by its own client's model, and by the base model."""
    start = {**opened.params, **opened.model.initial_params(opened.experiment.key)}
    note(f"{len(side)} records, tuned model")
    tuned: list[Tensor] = []
    for client, members in groupby(side, key=lambda member: member[0]):
        tuned += _losses(opened, opened.params_of(client), [example for _, example in members])
    note(f"{len(side)} records, base model")
    base = _losses(opened, start, [example for _, example in side])
    return model_scores(tuned, base, [_text(opened, example) for _, example in side])


def _losses(opened: LoadedRun, params: Tree, examples: Sequence[Example]) -> list[Tensor]:
    return opened.model.sequence_nll(params, examples, opened.experiment.evaluation.batch_size)


def _text(opened: LoadedRun, example: Example) -> str:
    return str(opened.model.base.tokenizer.decode(example.tokens.tolist(), skip_special_tokens=True))


def _finding(name: str, members: Floats, others: Floats) -> Finding:
    return Finding(name, auc(members, others), true_positives(members, others, RATE))
