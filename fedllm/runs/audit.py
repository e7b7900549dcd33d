"""An audit: attacks on a finished run, with what they reach and what it would be by chance."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedllm.data.federation import ConcatRecords
from fedllm.errors import RunError, not_written
from fedllm.evaluation.audits.intervals import Floats, Interval, auc, true_positives
from fedllm.evaluation.audits.membership import blind_scores, model_scores
from fedllm.files import to_json_text
from fedllm.models.batch import Example
from fedllm.rng import Key
from fedllm.runs.folder import write_whole
from fedllm.runs.loaded_run import LoadedRun, open_run

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
    """What the attacks reach. `members`, `others`: records of each side. `biased`: they can be told apart without the
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
    blind = _finding("blind", *blind_scores(*([_text(opened, one) for one in side] for side in sides)))
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
    path = folder / "audit.json"
    try:
        write_whole(path, to_json_text(as_json(found), indent=2) + "\n")
    except OSError as error:
        raise not_written(path, error) from error
    return path


def as_json(found: Audit) -> Mapping[str, Any]:
    """Plain values."""
    plain: Mapping[str, Any] = json.loads(json.dumps(asdict(found)))
    return plain


def _sides(opened: LoadedRun, records: int) -> tuple[tuple[list[Example], list[Example]], int]:
    """Members and others, at most so many of each; and how many of the others were left out as they are members."""
    population = opened.experiment.federation.load(opened.experiment.key)
    members = _examples(opened, ConcatRecords(population.train.values()))
    known = {_bytes(one) for one in members}
    held = _examples(opened, ConcatRecords(population.heldout.values()))
    others = [one for one in {_bytes(one): one for one in held}.values() if _bytes(one) not in known]
    key = Key(0).fold("audit")
    chosen = (_drawn(members, records, key.fold("members")), _drawn(others, records, key.fold("others")))
    return chosen, len(held) - len(others)


def _examples(opened: LoadedRun, records: Sequence[Any]) -> list[Example]:
    encoded = opened.model.encode_all(records, opened.experiment.work.max_length)
    return [one for one in encoded if one is not None]


def _drawn(examples: Sequence[Example], count: int, key: Key) -> list[Example]:
    places = torch.randperm(len(examples), generator=key.generator())[:count].tolist()
    return [examples[place] for place in sorted(places)]


def _scored(opened: LoadedRun, examples: Sequence[Example], note: Callable[[str], None]) -> dict[str, Floats]:
    start = {**opened.params, **opened.model.initial_params(opened.experiment.key)}
    losses: list[list[Tensor]] = []
    for name, params in (("tuned", opened.params), ("base", start)):
        note(f"{len(examples)} records, {name} model")
        losses.append(opened.model.sequence_nll(params, examples, opened.experiment.evaluation.batch_size))
    return model_scores(losses[0], losses[1], [_text(opened, one) for one in examples])


def _text(opened: LoadedRun, example: Example) -> str:
    return str(opened.model.base.tokenizer.decode(example.tokens.tolist(), skip_special_tokens=True))


def _finding(name: str, members: Floats, others: Floats) -> Finding:
    return Finding(name, auc(members, others), true_positives(members, others, RATE))


def _bytes(example: Example) -> bytes:
    return np.asarray(example.tokens).tobytes()
