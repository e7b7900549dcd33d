"""A run of a fraction of a second, and what two runs are compared by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fedllm
from fedllm.engines.base import Engine
from fedllm.engines.serial import Serial
from fedllm.events import (
    CheckpointSaved,
    Emit,
    EngineAdjusted,
    EngineChosen,
    EngineStarted,
    Event,
    MemoryMeasured,
    Progress,
    Resumed,
    RoundStarted,
    read,
    to_json,
)
from fedllm.experiment.record import Experiment
from fedllm.messages.call import Call, Replies
from fedllm.messages.update import Request, Update
from fedllm.report.run_history import effective

SIZES = {"ann": 6, "ben": 3, "cid": 2}
CLOCK = ("seconds", "seconds_per_round", "tokens_per_second", "peak_rss_bytes")
OF_A_PROCESS = (Resumed, Progress, EngineChosen, EngineStarted, EngineAdjusted, MemoryMeasured)
STATEFUL = {
    "stages": [{"scaffold": {}}, {"momentum": {"beta": 0.5}}, {"top_k": {"fraction": 0.3}}, "uniform"],
    "scope": {"share": ["*lora_A"]},
}


def write_records(path: Path) -> Path:
    """Eleven records of three people."""
    records = [
        {"prompt": f"{name} {number}?", "response": f"{name[::-1]}{number * 7}", "who": name}
        for name, size in SIZES.items()
        for number in range(size)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def spec(data: Path | str, **changes: Any) -> dict[str, Any]:
    """Three clients, LoRA of rank 2, three rounds of two steps. Dotted keys are written `work__sgd__lr`."""
    made: dict[str, Any] = {
        "task": {
            "model": "tiny-llama",
            "adapter": {"lora": {"rank": 2, "alpha": 4, "targets": ["q_proj", "v_proj"]}},
            "device": "cpu",
            "dtype": "float32",
        },
        "federation": {"shards": {"data": str(data), "heldout": str(data), "partition": {"by": "who"}}},
        "work": {"sgd": {"lr": 0.1, "steps": 2, "batch_size": 2, "max_length": 48}},
        "stages": ["by_examples"],
        "evaluation": {"metrics": ["nll"], "every": 1, "limit": 2},
        "rounds": 3,
    }
    for key, value in changes.items():
        place, steps = made, key.split("__")
        for step in steps[:-1]:
            place = place.setdefault(step, {})
        place[steps[-1]] = value
    return made


def small(data: Path | str, **changes: Any) -> Experiment:
    """The experiment of `spec`."""
    return fedllm.build(spec(data, **changes))


def stateful(data: Path | str, **changes: Any) -> Experiment:
    """With state on the server, memories on the clients, and leaves that stay there."""
    return small(data, stages=STATEFUL["stages"], task__scope=STATEFUL["scope"], **changes)


def adapter_hash(folder: Path) -> str:
    """SHA-256 of the adapters, the clients' own included."""
    files = [folder / "adapter" / "adapter_model.safetensors", *sorted(folder.glob("clients/*/adapter/*.safetensors"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def figures(folder: Path) -> dict[str, Any]:
    """The summary without what a clock or the machine says."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return {key: value for key, value in summary.items() if key not in CLOCK}


def events(folder: Path) -> list[Event]:
    """All of the log."""
    return [event for _, event in read(folder / "events.jsonl")]


def history(folder: Path) -> list[dict[str, Any]]:
    """The events that count, without times, marks of a resume, and what each process says of itself."""
    kept = [event for event in effective(events(folder)) if not isinstance(event, OF_A_PROCESS)]
    return [{key: value for key, value in to_json(event).items() if key != "seconds"} for event in kept]


def rounds_run_again(folder: Path) -> list[int]:
    """Rounds that were started although the log says that they are on disk."""
    saved, again = 0, []
    for event in events(folder):
        if isinstance(event, CheckpointSaved):
            saved = max(saved, event.round)
        if isinstance(event, RoundStarted) and event.round < saved:
            again.append(event.round)
    return again


class Stop(BaseException):
    """A crash in the middle of a run."""


@dataclass
class StopAt:
    """A listener that raises at the n-th event (from 0) for which `when` holds."""

    when: Any
    count: int = 0
    error: type[BaseException] = Stop

    def __call__(self, event: Event) -> None:
        if self.when(event):
            self.count -= 1
            if self.count < 0:
                raise self.error


@dataclass(eq=False)
class Spy(Engine):
    """The serial engine, remembering what was asked and answered."""

    asked: list[tuple[str, Request]] = field(default_factory=list)
    answered: list[tuple[str, str, Update]] = field(default_factory=list)

    @contextmanager
    def open(self, experiment: Experiment, folder: Path | None, emit: Emit) -> Iterator[Call]:
        """As the serial engine."""
        with Serial().open(experiment, folder, emit) as call:

            def watched(name: str, requests: Mapping[str, Request]) -> Replies:
                for client, reply in call(name, requests):
                    self.asked.append((name, requests[client]))
                    if isinstance(reply, Update):
                        self.answered.append((name, client, deepcopy(reply)))  # the reply is the aggregator's own
                    yield client, reply

            yield watched


def command(capsys: Any, *words: str | Path) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `fedllm WORDS`, in this process."""
    import pytest

    from fedllm.cli.main import main

    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr("sys.argv", ["fedllm", *map(str, words)])
        main()
    code = ended.value.code
    printed = capsys.readouterr()
    return 0 if code is None else int(code), printed.out, printed.err
