"""A small run for tests of secret sums, and what must not depend on how it was summed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedllm.data.shards import ClientOutage, Shards
from fedllm.events import Evaluated, RoundFinished, read
from fedllm.experiment.record import Experiment
from fedllm.runs.launch import Result
from fedllm.tensors import tree


def spec(folder: Path, clients: Sequence[str], **changes: Any) -> dict[str, Any]:
    """Two rounds of two steps on a model with random weights, and a few records in `folder` for each client."""
    data = folder / "records.jsonl"
    texts = [
        (f"{who} {number}?", f"{who[::-1]}{number * 7}", who) for number in range(5) for who in clients[number % 2 :]
    ]
    records = [dict(zip(("prompt", "response", "who"), text, strict=True)) for text in texts]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    return {
        "task": {"model": "tiny-llama", "adapter": {"lora": {"rank": 2, "alpha": 4, "targets": ["q_proj", "v_proj"]}}},
        "federation": {"shards": {"data": str(data), "partition": {"by": "who"}, "heldout": str(data)}},
        "work": {"sgd": {"lr": 0.1, "steps": 2, "batch_size": 2, "max_length": 64}},
        "stages": ["by_examples"],
        "evaluation": {"metrics": ["nll"], "every": 1, "limit": 2},
        "rounds": 2,
        **changes,
    }


def lose(experiment: Experiment, *losses: ClientOutage) -> Experiment:
    """The experiment with these outages."""
    assert isinstance(experiment.federation, Shards)
    return replace(experiment, federation=replace(experiment.federation, failures=losses))


def outcome(result: Result) -> tuple[str, Any, Any]:
    """What must not depend on engine and aggregator: parameters, scores, and each round's loss, tokens and clients."""
    events = [event for _, event in read(result.folder / "events.jsonl")]
    rounds = [(e.clients, e.loss, e.tokens, e.note) for e in events if isinstance(e, RoundFinished)]
    scores = [(e.which, e.round, e.metrics) for e in events if isinstance(e, Evaluated)]
    return tree.digest(result.params), rounds, scores
