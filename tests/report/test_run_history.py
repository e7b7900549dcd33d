"""What counts in a log: superseded rounds, newest evaluations, missing and broken files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.errors import RunError
from fedllm.events import (
    CheckpointSaved,
    ClientFailed,
    Evaluated,
    Event,
    MessageSent,
    Resumed,
    RoundFinished,
    RoundStarted,
    RunFinished,
    Warned,
)
from fedllm.report.run_history import client_scores, effective, load, load_all

Write = Callable[..., Path]


def finished(number: int, loss: float = 1.0) -> RoundFinished:
    return RoundFinished(number, 2, loss, 10, 20, 30, 0.5)


def test_resume_drops_lost_rounds_and_keeps_the_rest() -> None:
    base = Evaluated("base", 0, {"nll": 3.0})
    after_two = Evaluated("federated", 2, {"nll": 2.0})
    alone = Evaluated("local_only", 4, {"nll": 2.5})
    warned = Warned("short")
    before: list[Event] = [base, RoundStarted(0, ("a",)), finished(0), finished(1), CheckpointSaved(2), after_two]
    lost: list[Event] = [
        RoundStarted(2, ("a",)),
        MessageSent(2, "work", "a", "up", 5, {}),
        ClientFailed(2, "a", "gone"),
        finished(2, 9.0),
        CheckpointSaved(3),
        Evaluated("federated", 3, {"nll": 9.0}),
        RunFinished(3, 1.0, "time is up"),
    ]
    again: list[Event] = [finished(2, 0.7), Evaluated("federated", 3, {"nll": 1.5})]
    marker = Resumed(2)
    assert effective([*before, *lost, alone, warned, marker, *again]) == [*before, alone, warned, marker, *again]


def test_second_resume_reaches_behind_the_first() -> None:
    events = [finished(0), finished(1), Resumed(1), finished(1, 2.0), Resumed(0), finished(0, 3.0)]
    assert effective(events) == [Resumed(1), Resumed(0), finished(0, 3.0)]


@given(st.lists(st.one_of(st.integers(0, 6).map(finished), st.integers(0, 6).map(Resumed)), max_size=30))
def test_effective_agrees_with_a_walk_backwards(events: list[RoundFinished | Resumed]) -> None:
    kept: list[Event] = []
    limit = 99  # the earliest round that a later marker took back
    for event in reversed(events):
        if isinstance(event, Resumed):
            limit = min(limit, event.round)
            kept.append(event)
        elif event.round < limit:
            kept.append(event)
    assert effective(events) == kept[::-1]
    assert effective(effective(events)) == effective(events)


def test_story_reads_curves_and_totals(events: Callable[..., list[Event]], folder: Write) -> None:
    history = load(folder("archives-5e90c1d7", events(rounds=10)))
    assert history.label == "archives-5e90c1d7"
    assert history.model == "SmolLM2-135M-Instruct"
    assert list(history.evaluations) == ["base", "local_only", "federated", "centralised"]
    assert list(history.curve("nll")) == [5, 10]
    assert history.evaluations["federated"].note.startswith("mean over clients")
    # 4 clients in 9 rounds and 3 in one
    assert history.total("bytes_down") == 39 * 1_850_000
    assert history.total("tokens") == 39 * 2_560
    assert "rank: 8" in history.settings


def test_summary_and_experiment_win_where_they_are(events: Callable[..., list[Event]], folder: Write) -> None:
    path = folder("a", events(), {"seconds": 7.5, "bytes_up": None})
    (path / "experiment.yaml").write_text("rounds: 20  # as written\n")
    history = load(path)
    assert history.total("seconds") == 7.5
    assert history.total("bytes_up") == 79 * 1_860_000
    assert history.settings == "rounds: 20  # as written\n"


def test_a_loss_is_one_of_a_round_or_of_an_evaluation(folder: Write) -> None:
    events = [
        RoundStarted(0, ("a",)),
        ClientFailed(0, "a", "x"),
        ClientFailed(1, "a", "y", "evaluate"),
        RoundStarted(1, ("a",)),
    ]
    history = load(folder("a", [*events, ClientFailed(1, "a", "z")]))
    assert history.lost == [("round 1", "a", "x"), ("evaluation after round 1", "a", "y"), ("round 2", "a", "z")]


def test_bytes_of_an_evaluation_last_as_long_as_it() -> None:
    kept, lost = MessageSent(2, "evaluate", "a", "up", 5, {}), MessageSent(3, "evaluate", "a", "up", 5, {})
    failed, trained = ClientFailed(2, "a", "x", "evaluate"), ClientFailed(2, "a", "x")
    assert effective([kept, failed, lost, trained, Resumed(2)]) == [kept, failed, Resumed(2)]


def test_values_that_are_not_finite_are_no_points(folder: Write) -> None:
    scores = {"a": {"nll": float("nan")}, "b": {"nll": 1.0}, "c": {}}
    history = load(folder("a", [Evaluated("federated", 1, {"nll": float("nan")}, scores)]))
    assert history.curve("nll") == {}
    assert client_scores(history.evaluations["federated"], "nll") == {"b": 1.0}


def test_equal_names_are_told_apart_by_their_paths(folder: Write) -> None:
    one, two, three = folder("x/run", []), folder("y/run", []), folder("z", [])
    assert [history.label for history in load_all([one, two, three])] == [str(one), str(two), "z"]


def test_errors_name_the_file(tmp_path: Path, folder: Write) -> None:
    with pytest.raises(RunError, match=r"holds no events\.jsonl"):
        load(tmp_path)
    with pytest.raises(RunError, match="at least one"):
        load_all([])
    path = folder("a", [Warned("x")])
    (path / "summary.json").write_text("{")
    with pytest.raises(RunError, match=r"summary\.json is not JSON"):
        load(path)
    for line in ("no json\n", "[1]\n", '{"event": "warned"}\n', '{"event": "resumed", "at": 0}\n'):
        (path / "events.jsonl").write_text(line)
        with pytest.raises(RunError, match=r"events\.jsonl holds a line that is no event"):
            load(path)
