"""Figures from events: what they hold, that plotly takes them, that nothing in them is NaN or markup."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace

import plotly.graph_objects as go
import pytest

from fedllm.events import ClientFinished, DataReported, Evaluated, Event, RoundFinished, Wire
from fedllm.report import diagnosed, figures
from fedllm.report.plot import Figure, line, over_rounds, plain
from fedllm.report.story import Story

MakeEvents = Callable[..., list[Event]]


def story(events: list[Event], label: str = "run") -> Story:
    return Story(label, tuple(events), {}, "")


def everything(stories: list[Story]) -> list[Figure]:
    drawn = [
        draw(stories)
        for draw in (
            *(figures.loss, figures.metrics, figures.clients, figures.traffic, figures.parts, figures.seconds),
            diagnosed.figures,
        )
    ]
    data = [data for one in stories if (data := one.last(DataReported))]
    return [figure for some in drawn for figure in some] + [figure for one in data for figure in figures.partition(one)]


def names(figure: Figure) -> list[str]:
    return [trace["name"] for trace in figure.traces]


def trace(figure: Figure, name: str) -> dict[str, object]:
    return next(trace for trace in figure.traces if trace["name"] == name)


@pytest.mark.parametrize("count", [1, 2])
def test_plotly_takes_every_figure(events: MakeEvents, count: int) -> None:
    drawn = everything([story(events(rounds=6), f"run {place}") for place in range(count)])
    assert len(drawn) >= 10
    for figure in drawn:
        go.Figure(figure.data)  # validates names and values


def test_loss_of_rounds_and_of_clients(events: MakeEvents) -> None:
    made = events(rounds=8)
    (figure,) = figures.loss([story(made)])
    assert names(figure) == ["archive", "clinic", "library", "workshop", "all clients"]
    rounds = [event for event in made if isinstance(event, RoundFinished)]
    assert trace(figure, "all clients")["x"] == list(range(1, 9))
    assert trace(figure, "all clients")["y"] == [event.loss for event in rounds]
    assert trace(figure, "clinic")["x"] == [1, 2, 3, 4, 5, 6, 8]  # lost in the seventh


def test_hidden_losses_draw_nothing() -> None:
    hidden = [ClientFinished(0, "a", None, None, 1.0), RoundFinished(0, 1, None, 1, 1, 0, 1.0)]
    assert figures.loss([story(hidden)]) == []


def test_metric_families_of_one_run_and_of_two(events: MakeEvents) -> None:
    one = story(events(rounds=10))
    nll, match = figures.metrics([one])
    assert (nll.title, names(nll)) == ("nll", ["federated", "base", "local-only", "centralised"])
    assert trace(nll, "federated")["x"] == [5, 10]
    assert names(match)[:3] == ["exact_match", "exact_match/private", "exact_match/public"]
    both = figures.metrics([one, replace(one, label="other")])
    assert [figure.title for figure in both] == ["nll", "exact_match", "exact_match/private", "exact_match/public"]
    assert names(both[2]) == ["run", "other"]


def test_clients_stand_worst_first_whichever_way_is_better(events: MakeEvents) -> None:
    scores = {"a": {"nll": 1.0, "accuracy": 0.1}, "b": {"nll": 3.0, "accuracy": 0.9}, "c": {"nll": 2.0}}
    event = Evaluated("federated", 3, {"nll": 2.0, "accuracy": 0.5}, scores)
    nll, accuracy = figures.clients([story([event])])
    assert nll.traces[0]["customdata"] == ["b", "c", "a"]
    assert nll.traces[0]["x"] == [3.0, 2.0, 1.0]
    assert nll.layout["yaxis"]["ticktext"] == ["b", "c", "a"]
    assert accuracy.traces[0]["customdata"] == ["a", "b"]


def test_bytes_are_added_up_in_mebibytes() -> None:
    rounds = [RoundFinished(place, 1, 1.0, 2**20, 3 * 2**20, 1, 1.0) for place in range(3)]
    each, added = figures.traffic([story(list(rounds))])
    assert trace(each, "up")["y"] == [1.0, 1.0, 1.0]
    assert trace(added, "down")["y"] == [3.0, 6.0, 9.0]


def test_what_is_no_part_is_header() -> None:
    wires = [
        Wire(0, "work", "a", "down", 100, {"params": 90}),
        Wire(1, "evaluate", "a", "down", 100, {"params": 90}),
        Wire(0, "work", "a", "up", 50, {"delta": 40, "metrics": 4}),
        Wire(1, "work", "a", "up", 50, {"delta": 40, "metrics": 4}),
    ]
    assert list(figures.bytes_by_part(story(list(wires))).items()) == [
        (("up", "delta"), 80),
        (("up", "headers"), 12),
        (("up", "metrics"), 8),
        (("down", "params"), 90),
        (("down", "headers"), 10),
    ]


def test_partition_stacks_labels_and_joins_the_rare_ones() -> None:
    labels = {"a": {f"label {place:02d}": 100 - place for place in range(20)}, "b": {"label 19": 7}}
    data = DataReported({"a": sum(labels["a"].values()), "b": 7}, {"a": 1, "b": 1}, labels)
    (figure,) = figures.partition(data)
    assert len(figure.traces) == 12
    assert names(figure)[-1] == "all other labels"
    for place, client in enumerate(("a", "b")):
        stacked = sum(trace["x"][place] for trace in figure.traces)
        assert stacked == data.train[client]
    (plainly,) = figures.partition(replace(data, labels={}))
    assert names(plainly) == ["training", "held out"]


def test_nothing_is_drawn_from_nothing() -> None:
    assert everything([story([])]) == []
    assert figures.partition(DataReported({}, {})) == []


def test_points_that_are_not_finite_are_left_out(events: MakeEvents) -> None:
    broken = [
        replace(event, loss=math.nan) if isinstance(event, RoundFinished) and event.round == 2 else event
        for event in events(rounds=5)
    ]
    scores = {"nll": math.inf, "exact_match": 0.5}
    broken.append(Evaluated("federated", 5, scores, {"archive": {"nll": math.nan}, "clinic": {"nll": 2.0}}))
    drawn = everything([story(broken)])
    assert trace(drawn[0], "all clients")["x"] == [1, 2, 4, 5]
    for figure in drawn:
        json.loads(figure.json(), parse_constant=pytest.fail)


def test_json_refuses_nan_and_cannot_end_its_script() -> None:
    traces = [line("</script><b>&", {1: 1.0, 2: 2.0}, shade="#000000")]
    figure = over_rounds("t", "n", traces, unit="<!--")
    text = figure.json()
    assert "<" not in text and ">" not in text and "&" not in text
    assert json.loads(text) == figure.data
    with pytest.raises(ValueError):
        Figure("t", "n", ({"y": [math.nan]},), {}).json()


def test_plain_text_is_escaped_and_shortened() -> None:
    assert plain("<a href='x'>&") == "&lt;a href='x'&gt;&amp;"
    long = "client-" + "x" * 80 + "-end"
    assert len(plain(long)) == 36
    assert plain(long).endswith("-end")


def test_two_long_names_stay_two_rows() -> None:
    rows = [f"{'x' * 40}{place}{'y' * 40}" for place in range(2)]
    event = Evaluated("federated", 1, {"nll": 1.0}, {row: {"nll": 1.0} for row in rows})
    (figure,) = figures.clients([story([event])])
    assert figure.traces[0]["y"] == [0, 1]
