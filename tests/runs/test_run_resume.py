"""A run that was stopped anywhere and resumed is the run that was not stopped, to the bit."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fedllm
from fedllm.engines import client_store
from fedllm.errors import RunError
from fedllm.events import (
    CheckpointSaved,
    ClientFinished,
    Evaluated,
    Event,
    MessageSent,
    Resumed,
    RoundFinished,
    RoundStarted,
    RunFinished,
    RunStarted,
)
from fedllm.runs import checkpoints
from fedllm.runs.checkpoints import Checkpoints
from fedllm.runs.launch import Interrupted
from tests.runs.small import (
    STATEFUL,
    Stop,
    StopAt,
    adapter_hash,
    events,
    figures,
    history,
    rounds_run_again,
    small,
    spec,
    stateful,
)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> fedllm.Result:
    """The stateful run, never stopped."""
    return fedllm.run(stateful(data), out=tmp_path_factory.mktemp("whole") / "run", name="small")


def assert_same(folder: Path, whole: fedllm.Result) -> None:
    assert adapter_hash(folder) == adapter_hash(whole.folder)
    assert figures(folder) == figures(whole.folder)
    assert history(folder) == history(whole.folder)
    assert rounds_run_again(folder) == []


def test_the_run_that_is_compared_with_has_state_and_memories(whole: fedllm.Result) -> None:
    checkpoint = Checkpoints(whole.folder / "checkpoints", 2).load()
    assert checkpoint is not None
    assert [bool(tree) for tree in checkpoint.states] == [False, True, True, False, False]  # keep, scaffold, momentum
    memories = client_store.ClientStore(whole.folder / "checkpoints" / "clients").load("ann", 3, 5)
    assert [bool(tree) for tree in memories] == [True, True, False, True, False]  # keep, scaffold, top_k


@pytest.mark.parametrize("rounds", [0, 1, 2, 3])
def test_stopped_after_any_round(data: Path, whole: fedllm.Result, tmp_path: Path, rounds: int) -> None:
    stop = StopAt(lambda event: isinstance(event, CheckpointSaved) and event.round == rounds)
    with pytest.raises(Stop):
        fedllm.run(stateful(data), out=tmp_path / "run", name="small", listeners=[stop])
    assert not (tmp_path / "run" / "summary.json").exists()
    fedllm.run(stateful(data), out=tmp_path / "run", name="small", resume=True)
    assert_same(tmp_path / "run", whole)
    started = [event.round for event in events(tmp_path / "run") if isinstance(event, RoundStarted)]
    assert started == [0, 1, 2]


@pytest.mark.parametrize(
    ("kind", "count"),
    [(RunStarted, 0), (MessageSent, 3), (ClientFinished, 4), (RoundFinished, 1), (Evaluated, 0), (Evaluated, 2)],
)
def test_ctrl_c_anywhere(data: Path, whole: fedllm.Result, tmp_path: Path, kind: type[Event], count: int) -> None:
    stop = StopAt(lambda event: isinstance(event, kind), count, KeyboardInterrupt)
    with pytest.raises(Interrupted, match=r"complete rounds? (is|are) saved"):
        fedllm.run(stateful(data), out=tmp_path / "run", name="small", listeners=[stop])
    fedllm.run(stateful(data), out=tmp_path / "run", name="small", resume=True)
    assert_same(tmp_path / "run", whole)


def test_ctrl_c_while_the_outputs_are_written(data: Path, whole: fedllm.Result, tmp_path: Path) -> None:
    stop = StopAt(lambda event: isinstance(event, RunFinished), 0, KeyboardInterrupt)
    with pytest.raises(Interrupted):
        fedllm.run(stateful(data), out=tmp_path / "run", name="small", listeners=[stop])
    fedllm.run(stateful(data), out=tmp_path / "run", name="small", resume=True)
    assert_same(tmp_path / "run", whole)


def test_ctrl_c_saves_rounds_that_were_not_due(data: Path, tmp_path: Path) -> None:
    experiment = stateful(data, limits__checkpoint_every=3)
    whole = fedllm.run(experiment, out=tmp_path / "whole")
    stop = StopAt(lambda event: isinstance(event, RoundStarted) and event.round == 2, 0, KeyboardInterrupt)
    with pytest.raises(Interrupted, match="2 complete rounds"):
        fedllm.run(experiment, out=tmp_path / "run", listeners=[stop])
    fedllm.run(experiment, out=tmp_path / "run", resume=True)
    assert adapter_hash(tmp_path / "run") == adapter_hash(whole.folder)
    assert figures(tmp_path / "run") == figures(whole.folder)
    assert [event.round for event in events(tmp_path / "run") if isinstance(event, RoundStarted)] == [0, 1, 2, 2]
    assert len([event for event in events(tmp_path / "run") if isinstance(event, RoundFinished)]) == 3


def test_a_crash_between_sparse_checkpoints_runs_their_rounds_again(data: Path, tmp_path: Path) -> None:
    experiment = stateful(data, limits__checkpoint_every=2, evaluation__every=None)
    whole = fedllm.run(experiment, out=tmp_path / "whole")
    stop = StopAt(lambda event: isinstance(event, RoundFinished))
    with pytest.raises(Stop):
        fedllm.run(experiment, out=tmp_path / "run", listeners=[stop])
    fedllm.run(experiment, out=tmp_path / "run", resume=True)
    assert_same(tmp_path / "run", whole)
    assert [event.round for event in events(tmp_path / "run") if isinstance(event, RoundStarted)] == [0, 0, 1, 2]


def test_a_full_disk_leaves_the_last_checkpoint(
    data: Path, whole: fedllm.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoints.write_durably

    def full(path: Path, content: bytes) -> None:
        if "round-000002" in str(path):
            write(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_durably", full)
        with pytest.raises(RunError, match="No space left on device"):
            fedllm.run(stateful(data), out=tmp_path / "run", name="small")
    assert Checkpoints(tmp_path / "run" / "checkpoints", 2).rounds() == [0, 1]
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))
    fedllm.run(stateful(data), out=tmp_path / "run", name="small", resume=True)
    assert_same(tmp_path / "run", whole)


def test_a_full_disk_is_no_failure_of_a_client(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = client_store.write_durably

    def full(path: Path, content: bytes) -> None:
        if path.parent.name == "ben":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    monkeypatch.setattr(client_store, "write_durably", full)
    with pytest.raises(RunError, match="No space left on device"):
        fedllm.run(stateful(data), out=tmp_path / "run")
    assert not [event for event in events(tmp_path / "run") if isinstance(event, RoundFinished)]


def test_listeners_hear_again_what_is_resumed(data: Path, tmp_path: Path) -> None:
    stop = StopAt(lambda event: isinstance(event, RoundStarted) and event.round == 1)
    with pytest.raises(Stop):
        fedllm.run(small(data), out=tmp_path / "run", name="mine", listeners=[stop])
    heard: list[Event] = []
    fedllm.run(small(data), out=tmp_path / "run", name="mine", resume=True, listeners=[heard.append])
    assert isinstance(heard[0], RunStarted) and heard[0].name == "mine"
    assert isinstance(heard[1], Resumed) and heard[1].round == 1
    assert len([event for event in events(tmp_path / "run") if isinstance(event, RunStarted)]) == 1


def test_two_processes_cannot_write_one_run(data: Path, tmp_path: Path) -> None:
    def again(event: Event) -> None:
        if isinstance(event, RoundStarted):
            with pytest.raises(RunError, match="another process is running"):
                fedllm.run(small(data, rounds=1), out=tmp_path / "run", resume=True)

    fedllm.run(small(data, rounds=1), out=tmp_path / "run", listeners=[again])
    assert (tmp_path / "run" / "summary.json").is_file()


@pytest.fixture(scope="module")
def killed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `kill_driver.py` saw of runs that it killed and resumed, by the name of the kill."""
    folder = tmp_path_factory.mktemp("killed")
    settings = spec(data, stages=STATEFUL["stages"], task__scope=STATEFUL["scope"])
    settings["evaluation"] |= {"compare": ["local_only", "centralised"]}
    (folder / "spec.json").write_text(json.dumps(settings), encoding="utf-8")
    command = [sys.executable, "-m", "tests.runs.kill_driver", str(folder / "spec.json"), str(folder)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_killed_between_any_two_events(killed: dict[str, Any]) -> None:
    whole, kills = killed["whole"], killed["kills"]
    counts = {kill["event"] for kill in kills if "event" in kill}
    assert len(counts) >= 20, "kills at 20 different counts of events"
    assert min(counts) == 0 and max(counts) == whole["events"] - 1
    for kill in kills:
        assert kill["signal"] == 9, f"{kill['name']}: the run was not killed"
        for key in ("adapter", "figures", "history"):
            assert kill[key] == whole[key], f"{kill['name']}: another {key}"
        assert kill["again"] == [], f"{kill['name']}: completed rounds were run again"


@pytest.mark.slow
def test_killed_within_a_write(killed: dict[str, Any]) -> None:
    names = [kill["name"] for kill in killed["kills"]]
    assert [name for name in names if name.startswith("rename of round-")]
    assert [name for name in names if name.startswith("rename of 00000")], "a client's memory"
    assert "rename of summary.json" in names
