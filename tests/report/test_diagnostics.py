"""The chapter on the clients' updates: pictures of one run and of several, the numbers, and why there are none."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from fedllm.events import Diagnosed, Event, RoundFinished, RunStarted
from fedllm.report import diagnostics
from fedllm.report.plot import Figure
from fedllm.report.run_history import RunHistory
from fedllm.report.sections import sections

MakeEvents = Callable[..., list[Event]]


def history(events: list[Event], label: str = "run") -> RunHistory:
    return RunHistory(label, tuple(events), {}, "")


def by_title(drawn: list[Figure]) -> dict[str, Figure]:
    return {figure.title: figure for figure in drawn}


def lines(figure: Figure) -> dict[str, list[float]]:
    return {trace["name"]: trace["y"] for trace in figure.traces}


def test_one_run(events: MakeEvents) -> None:
    made = events(rounds=8)
    seen = [event for event in made if isinstance(event, Diagnosed)]
    found = by_title(diagnostics.figures([history(made)]))
    assert list(found) == [
        "Drift",
        "Agreement of the updates",
        "Aggregation bias",
        "Effective rank",
        "Cosines in round 8",
    ]
    drifts = lines(found["Drift"])
    assert list(drifts) == ["archive", "clinic", "library", "workshop", "mean"]
    assert drifts["mean"] == [event.drift for event in seen] and len(drifts["clinic"]) == 7  # lost in the seventh
    assert lines(found["Agreement of the updates"]) == {"run": [event.cosine for event in seen]}
    assert lines(found["Aggregation bias"]) == {
        "this run": [event.bias for event in seen],
        "mean of the factors": [event.bias_of_means for event in seen],
    }


def test_several_runs_have_a_line_each(events: MakeEvents) -> None:
    histories = [history(events(rounds=4), "one"), history(events(rounds=6), "two")]
    found = by_title(diagnostics.figures(histories))
    assert [list(lines(found[title])) for title in ("Drift", "Aggregation bias", "Effective rank")] == [
        ["one", "two"]
    ] * 3
    assert "Cosines in round 4, one" in found and "Cosines in round 6, two" in found


def test_the_matrix_has_each_pair_twice_and_no_diagonal(events: MakeEvents) -> None:
    made = [event for event in events(rounds=1) if isinstance(event, Diagnosed)]
    event = replace(made[0], clients=dict.fromkeys("abc", 1.0), cosines=(0.1, 0.2, 0.3))
    (trace,) = by_title(diagnostics.figures([history([event])]))["Cosines in round 1"].traces
    assert trace["z"] == [[None, 0.1, 0.2], [0.1, None, 0.3], [0.2, 0.3, None]]


def test_cosines_that_are_not_finite_are_no_figure(events: MakeEvents) -> None:
    """Of a diverged round there is nothing to see; the newest round with a cosine is shown."""
    first, second = (event for event in events(rounds=2) if isinstance(event, Diagnosed))
    broken = replace(second, cosines=(math.nan,) * len(second.cosines))
    assert "Cosines in round 1" in by_title(diagnostics.figures([history([first, broken])]))
    assert not any("Cosines" in title for title in by_title(diagnostics.figures([history([broken])])))


def test_energy_where_ranks_differ(events: MakeEvents) -> None:
    made = [replace(e, energy_above=0.25, smallest_rank=4) if isinstance(e, Diagnosed) else e for e in events(rounds=2)]
    assert lines(by_title(diagnostics.figures([history(made)]))["Energy above the smallest rank"]) == {
        "run": [0.25, 0.25]
    }


def test_figures_that_do_not_apply_are_left_out(events: MakeEvents) -> None:
    """Full weights of a large model: drift is all there is."""
    bare = dict.fromkeys(("cosine", "dissimilarity", "bias", "bias_of_means", "product_norm", "effective_rank"))
    made: list[Event] = [
        replace(event, clients={}, cosines=(), **bare) for event in events(rounds=3) if isinstance(event, Diagnosed)
    ]
    drawn = diagnostics.figures([history(made)])
    assert [figure.title for figure in drawn] == ["Drift"] and list(lines(drawn[0])) == ["mean"]
    assert '<th scope="col">round</th>' in diagnostics.numbers(history(made)) and "bias" not in diagnostics.numbers(
        history(made)
    )


def test_many_clients_have_no_lines_of_their_own(events: MakeEvents) -> None:
    made = [event for event in events(rounds=1) if isinstance(event, Diagnosed)]
    many = replace(made[0], clients={f"c{number}": 1.0 for number in range(13)}, cosines=())
    assert list(lines(diagnostics.figures([history([many])])[0])) == ["mean"]


def test_numbers_are_those_of_the_events(events: MakeEvents) -> None:
    told = diagnostics.numbers(history(events(rounds=2)))
    assert "<caption>What the updates of run showed, round by round</caption>" in told
    assert 'data-column="bias">0.1000</td>' in told and 'data-column="bias of means">0.2000</td>' in told


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"evaluation": {"diagnostics": None}}, "evaluation.diagnostics is null"),
        (
            {"evaluation": {"diagnostics": {}}, "demands": {"secrecy": True}},
            "nothing but sums of updates (demands.secrecy)",
        ),
        ({"evaluation": {"diagnostics": {}}, "demands": {"secrecy": False}}, "hidden from the server"),
        ({"evaluation": {}}, ""),
        ({}, ""),
    ],
)
def test_why_there_is_nothing(settings: dict[str, Any], reason: str) -> None:
    started = RunStarted("a", "5e90c1d7", "serial", "model", 1, 2, 10, settings, {})
    run = history([started, RoundFinished(0, 2, 1.0, 1, 1, 1, 1.0)])
    assert reason in diagnostics.absence(run) and bool(reason) == bool(diagnostics.absence(run))
    chapter = dict(sections([run]))["Updates"]
    assert reason in chapter and bool(reason) == bool(chapter)


def test_no_reason_is_needed(events: MakeEvents) -> None:
    started = RunStarted("a", "5e90c1d7", "serial", "model", 1, 2, 10, {"evaluation": {"diagnostics": {}}}, {})
    seen = [event for event in events(rounds=1) if isinstance(event, Diagnosed)]
    assert diagnostics.absence(history([started, *seen])) == ""
    empty = RoundFinished(0, 0, None, 1, 1, 1, 1.0, "nobody was drawn")
    assert diagnostics.absence(history([started, empty])) == "" == diagnostics.absence(history([started]))
