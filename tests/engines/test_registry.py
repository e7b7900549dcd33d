"""Which engine runs, and why; what the command line refuses in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fedllm
from fedllm.events import EngineChosen, RunStarted
from fedllm.experiment.config_file import build
from tests.runs.small import command, events, small, spec, write_records

FULL = {"task__adapter": {"full": {}}}
IA3 = {
    "task__adapter": {"peft": {"type": "ia3", "settings": {"target_modules": ["k_proj"], "feedforward_modules": []}}}
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_records(tmp_path / "people.jsonl")


@pytest.mark.parametrize(("changes", "engine"), [({}, "batched"), (FULL, "serial"), (IA3, "serial")])
def test_auto_takes_stacks_where_there_can_be(
    data: Path, tmp_path: Path, changes: dict[str, object], engine: str
) -> None:
    run = fedllm.run(small(data, rounds=1, **changes), out=tmp_path / "run")
    (chosen,) = [event for event in events(run.folder) if isinstance(event, EngineChosen)]
    (started,) = [event for event in events(run.folder) if isinstance(event, RunStarted)]
    assert (chosen.engine, started.engine, run.summary["engine"]) == (engine,) * 3
    expected = "its clients can be stacked" if engine == "batched" else " trains one client at a time"
    assert chosen.reason.endswith(expected)


@pytest.mark.parametrize(
    ("engine", "sentence"),
    [
        ("batchd", "unknown engine 'batchd'"),
        ("{batched: {stack: 0}}", "engine.batched.stack is 0; it must be 1 or more"),
        ("{batched: {workers: 0}}", "engine.batched.workers is 0; it must be 1 or more"),
        ("{batched: {stacks: 4}}", "unknown key 'engine.batched.stacks'"),
        ("{batched: {memory_budget: lots}}", "memory_budget is 'lots'; write an amount such as 2GB"),
        ("{batched: {memory_budget: 1KB}}", "raise engine.batched.memory_budget to"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], engine: str, sentence: str
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps(spec(data)), encoding="utf-8")
    code, _, error = command(capsys, "run", str(file), "--engine", engine, "--out", str(tmp_path / "run"))
    assert code == 2 and sentence in error and "Traceback" not in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists(), "nothing half-written"


@pytest.mark.parametrize("changes", [FULL, IA3], ids=["full", "ia3"])
def test_stacks_that_cannot_be_are_refused_when_asked_for(
    data: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    with pytest.raises(fedllm.errors.CheckError, match=r"engine batched: .*; use --engine serial, or auto"):
        fedllm.run(build(spec(data, **changes)), engine="batched", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
