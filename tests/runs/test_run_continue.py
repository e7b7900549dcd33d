"""Going on from a finished run with more rounds equals one run of all of them, to the bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fedllm
from fedllm.errors import RunError
from fedllm.events import Evaluated, RoundFinished, RoundStarted, RunFinished, RunStarted, Warned
from fedllm.runs.checkpoints import Checkpoints
from fedllm.runs.folder import Folder
from fedllm.tensors.tree import digest
from tests.runs.small import STATEFUL, Stop, StopAt, adapter_hash, command, events, figures, small, stateful

Change = Callable[[Path], dict[str, Any]]


@pytest.fixture(scope="module")
def half(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One round with a state on the server, memories on the clients and leaves of their own."""
    return fedllm.run(stateful(data, rounds=1), out=tmp_path_factory.mktemp("half") / "run").folder


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three rounds in one."""
    return fedllm.run(stateful(data, rounds=3), out=tmp_path_factory.mktemp("whole") / "run").folder


def states(folder: Path) -> list[str]:
    """Of the server, and of each file of a client's memory that a later round may ask for."""
    saved = Checkpoints(folder / "checkpoints", 2).load()
    assert saved is not None
    memories = sorted((folder / "checkpoints" / "clients").glob("*/*.safetensors"))
    files = [f"{path.parent.name}/{path.name} {path.read_bytes().hex()[-64:]}" for path in memories]
    return [digest(saved.params), *map(digest, saved.states), *files]


def summary(folder: Path) -> dict[str, Any]:
    return Folder(folder).read_summary()


def rounds(folder: Path) -> list[RoundFinished]:
    return [event for event in events(folder) if isinstance(event, RoundFinished)]


def test_more_rounds_equal_one_run_of_all(data: Path, half: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    stop = StopAt(lambda event: isinstance(event, RoundStarted) and event.round == 2)
    with pytest.raises(Stop):
        fedllm.run(stateful(data, rounds=3), out=out, continues=half, listeners=[stop])
    moved = shutil.move(half, tmp_path / "elsewhere")  # what a resume needs is in the new folder
    try:
        fedllm.run(stateful(data, rounds=3), out=out, resume=True)
    finally:
        shutil.move(moved, half)
    assert adapter_hash(out) == adapter_hash(whole) != adapter_hash(half)
    assert states(out) == states(whole)
    assert {**figures(out), "notes": {}} == {**figures(whole), "notes": {}}
    kept = [(event.round, event.loss, event.bytes_up, event.tokens) for event in rounds(out)]
    assert kept == [(event.round, event.loss, event.bytes_up, event.tokens) for event in rounds(whole)]
    (started,) = (event for event in events(out) if isinstance(event, RunStarted))
    assert started.rounds == 3 and len([e for e in events(out) if isinstance(e, RunFinished)]) == 1
    assert [e.round for e in events(out) if isinstance(e, Evaluated) and e.which == "base"] == [0]
    mark = Folder(out).about["continues"]
    assert (mark["folder"], mark["round"]) == (str(half), 1)
    assert summary(out)["seconds"] > summary(half)["seconds"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rounds": 1}, "has 1 rounds already, and rounds, which counts them, is 1; set it above 1"),
        ({"seed": 1}, "seed: 0 there, 1 here: its parameters belong"),
        ({"task__adapter__lora__rank": 4}, r"rank: 2 there, 4 here: its parameters belong"),
        ({"stages": ["by_examples"]}, "stages: .*kept belongs to these stages"),
        ({"federation__shards__heldout": 0.5}, "heldout: .*kept belongs to these stages and clients"),
        ({"limits__bytes": 1}, r"limits.bytes \(1\) was reached .* which counts the rounds of"),
    ],
)
def test_what_leaves_nothing_to_go_on_from_is_refused(
    data: Path, half: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(RunError, match=said):
        kept = {"stages": STATEFUL["stages"], "task__scope": STATEFUL["scope"], "rounds": 4}
        fedllm.run(small(data, **{**kept, **changes}), out=tmp_path / "run", continues=half)
    assert not (tmp_path / "run").exists()


def test_what_keeps_no_state_may_change_its_stages(data: Path, tmp_path: Path, finished: fedllm.Result) -> None:
    schedule = {"shape": "linear", "over": "run"}
    more = small(data, rounds=4, stages=[{"momentum": {}}, "uniform"], work__sgd__lr_schedule=schedule)
    made = fedllm.run(more, out=tmp_path / "run", continues=finished.folder)
    assert [event.round for event in rounds(made.folder)] == [0, 1, 2, 3]
    (warned,) = (event.text for event in events(made.folder) if isinstance(event, Warned) and "scheduled" in event.text)
    assert "in the first 3 rounds over 3, from here on over 4" in warned


def test_another_folder_and_bad_names_are_refused(data: Path, tmp_path: Path, finished: fedllm.Result) -> None:
    stop = StopAt(lambda event: isinstance(event, RoundStarted) and event.round == 1)
    with pytest.raises(Stop):
        fedllm.run(small(data, rounds=4), out=tmp_path / "half", listeners=[stop])
    with pytest.raises(RunError, match="half is unfinished; go on with it by --resume"):
        fedllm.run(small(data, rounds=5), out=tmp_path / "run", continues=tmp_path / "half")
    with pytest.raises(RunError, match=r"hlf is no run folder .*did you mean '.*half'"):
        fedllm.run(small(data, rounds=4), out=tmp_path / "run", continues=tmp_path / "hlf")
    with pytest.raises(RunError, match="half holds a run that does not go on from"):
        fedllm.run(small(data, rounds=4), out=tmp_path / "half", continues=finished.folder)


def test_the_command_has_a_folder_of_its_own(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, finished: fedllm.Result
) -> None:
    monkeypatch.chdir(tmp_path)
    file = finished.folder / "experiment.yaml"
    code, out, err = command(capsys, "run", file, "rounds=4", "--continue", finished.folder)
    assert code == 0, err
    (made,) = (tmp_path / "runs").iterdir()
    assert made.name.startswith("experiment-") and made.name.endswith(
        f"-from-{finished.summary['experiment_hash'][:8]}"
    )
    assert "resumed with round 4/4" in out
    code, out, err = command(capsys, "run", file, "rounds=4", "--continue", finished.folder)
    assert code == 0 and "This run is finished" in out
