"""A made-up run: four clients, a loss that falls, one lost client, one warning."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean

import pytest

from fedllm.events import (
    ClientFailed,
    ClientFinished,
    DataReported,
    Diagnosed,
    Evaluated,
    Event,
    MessageSent,
    RoundFinished,
    RoundStarted,
    RunFinished,
    RunStarted,
    Warned,
)
from fedllm.runs.event_log import Log

CLIENTS = ("archive", "clinic", "library", "workshop")
LABELS = {
    "archive": {"letters": 210, "deeds": 96, "maps": 12},
    "clinic": {"letters": 18, "deeds": 4, "notes": 301},
    "library": {"letters": 80, "maps": 140, "notes": 44},
    "workshop": {"maps": 22, "deeds": 61, "notes": 9},
}


def _loss(round: int, *, speed: float, place: int = 0) -> float:
    return 1.35 + 0.12 * place + 1.25 * math.exp(-speed * round) + 0.05 * math.sin(3.1 * round + place)


def _scores(round: int, *, speed: float, place: int = 0) -> dict[str, float]:
    nll = 1.42 + 0.1 * place + 1.2 * math.exp(-speed * round)
    hit = (0.52 - 0.04 * place) * (1 - 0.9 * math.exp(-speed * round))
    return {"nll": nll, "exact_match": hit, "exact_match/private": 0.8 * hit, "exact_match/public": min(1.0, 1.1 * hit)}


def _evaluated(which: str, round: int, *, speed: float, note: str = "") -> Evaluated:
    clients = {name: _scores(round, speed=speed, place=place) for place, name in enumerate(CLIENTS)}
    if which == "centralised":
        clients = {}
    return Evaluated(which, round, _scores(round, speed=speed, place=1), clients, note)


def _diagnosed(number: int, present: Sequence[str]) -> Diagnosed:
    drifts = {name: 1.5 + 0.2 * place + math.exp(-0.1 * number) for place, name in enumerate(present)}
    cosines = tuple(0.4 * math.cos(place) - 0.01 * number for place in range(len(present) * (len(present) - 1) // 2))
    return Diagnosed(
        round=number,
        answered=len(present),
        drift=fmean(drifts.values()),
        clients=drifts,
        cosine=fmean(cosines),
        dissimilarity=1.6,
        bias=0.1 / (number + 1),
        bias_of_means=0.2 / (number + 1),
        product_norm=3.0 + 0.1 * number,
        effective_rank=5.5 + math.sin(number),
        energy_above=None,
        smallest_rank=None,
        cosines=cosines,
    )


def _round(number: int, *, speed: float, bytes_up: int) -> Iterator[Event]:
    yield RoundStarted(number, CLIENTS)
    lost = number == 6
    present = [name for name in CLIENTS if not (lost and name == "clinic")]
    for place, name in enumerate(present):
        yield MessageSent(number, "work", name, "down", 1_850_000, {"params": 1_843_200})
        parts = {"delta": bytes_up - 9_000, "metrics": 400}
        yield MessageSent(number, "work", name, "up", bytes_up, parts)
        yield ClientFinished(number, name, _loss(number, speed=speed, place=place), 2_560, 1.1 + 0.2 * place)
    if lost:
        yield ClientFailed(number, "clinic", "no reply within 30 s")
    yield _diagnosed(number, present)
    count = len(present)
    loss = _loss(number, speed=speed, place=1)
    yield RoundFinished(
        number, count, loss, count * bytes_up, count * 1_850_000, 2_560 * count, 4.4 + 0.3 * math.cos(number)
    )


def made_up(*, rounds: int = 20, speed: float = 0.2, bytes_up: int = 1_860_000, name: str = "archives") -> list[Event]:
    """The events of a whole run."""
    settings = {
        "task": {"model": "smollm2-135m-instruct", "adapter": {"lora": {"rank": 8, "alpha": 16}}, "objective": "sft"},
        "work": {"sgd": {"optimizer": "adamw", "lr": 1e-3, "steps": 10, "batch_size": 4}},
        "stages": [] if bytes_up > 1_000_000 else [{"quantize": {"bits": 4}}],
        "rounds": rounds,
        "seed": 0,
    }
    versions = {"fedllm": "0.1.0", "torch": "2.13.0", "python": "3.11.2"}
    model = "SmolLM2-135M-Instruct"
    events: list[Event] = [
        RunStarted(name, f"{bytes_up:08x}c1d7aa42", "serial", model, rounds, 4, 921_600, settings, versions),
        DataReported(
            {client: sum(labels.values()) for client, labels in LABELS.items()},
            {client: sum(labels.values()) // 10 for client, labels in LABELS.items()},
            LABELS,
            divergence=0.31,
            left_out=17,
            cut=9,
        ),
        Warned("library: 9 examples are longer than 128 tokens and were cut"),
        _evaluated("base", 0, speed=speed),
    ]
    for number in range(rounds):
        events += _round(number, speed=speed, bytes_up=bytes_up)
        if (number + 1) % 5 == 0:
            events.append(_evaluated("federated", number + 1, speed=speed))
    last = _evaluated("federated", rounds, speed=speed, note="mean over clients, weighted by held-out records")
    alone = _evaluated("local_only", rounds, speed=speed * 0.35, note="each client alone, as many steps")
    pooled = _evaluated("centralised", rounds, speed=speed * 1.4, note="all records in one place")
    return [*events, last, alone, pooled, RunFinished(rounds, 104.2)]


@pytest.fixture
def events() -> Callable[..., list[Event]]:
    return made_up


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes a run folder and names it."""

    def write(name: str, events: Iterable[Event], summary: dict[str, object] | None = None) -> Path:
        path = tmp_path / name
        path.mkdir(parents=True)
        log = Log(path / "events.jsonl")
        for event in events:
            log(event)
        log.close()
        if summary is not None:
            (path / "summary.json").write_text(json.dumps(summary))
        return path

    return write
