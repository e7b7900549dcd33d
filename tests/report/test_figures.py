"""Figures from events: what they hold, that plotly takes them, that nothing in them is NaN or markup."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace

import plotly.graph_objects as go
import pytest

from fedllm.events import (
    ClientFinished,
    DataReported,
    Diagnosed,
    Evaluated,
    Event,
    MessageSent,
    RoundFinished,
    RunStarted,
)
from fedllm.report import diagnostics, figures, groups
from fedllm.report.plot import Figure, line, over_rounds, plain
from fedllm.report.run_history import RunHistory

MakeEvents = Callable[..., list[Event]]


def history(events: list[Event], label: str = "run") -> RunHistory:
    return RunHistory(label, tuple(events), {}, "")


def everything(histories: list[RunHistory]) -> list[Figure]:
    drawn = [
        draw(histories)
        for draw in (
            *(figures.loss, figures.metrics, figures.clients, figures.traffic, figures.parts, figures.seconds),
            *(diagnostics.figures, groups.by_group),
        )
    ]
    data = [data for one in histories if (data := one.last(DataReported))]
    return [figure for some in drawn for figure in some] + [figure for one in data for figure in figures.partition(one)]


def names(figure: Figure) -> list[str]:
    return [trace["name"] for trace in figure.traces]


def trace(figure: Figure, name: str) -> dict[str, object]:
    return next(trace for trace in figure.traces if trace["name"] == name)


@pytest.mark.parametrize("count", [1, 2])
def test_plotly_takes_every_figure(events: MakeEvents, count: int) -> None:
    drawn = everything([history(events(rounds=6), f"run {place}") for place in range(count)])
    assert len(drawn) >= 10
    for figure in drawn:
        go.Figure(figure.data)  # validates names and values


def test_loss_of_rounds_and_of_clients(events: MakeEvents) -> None:
    made = events(rounds=8)
    (figure,) = figures.loss([history(made)])
    assert names(figure) == ["archive", "clinic", "library", "workshop", "all clients"]
    rounds = [event for event in made if isinstance(event, RoundFinished)]
    assert trace(figure, "all clients")["x"] == list(range(1, 9))
    assert trace(figure, "all clients")["y"] == [event.loss for event in rounds]
    assert trace(figure, "clinic")["x"] == [1, 2, 3, 4, 5, 6, 8]  # lost in the seventh


def test_hidden_losses_draw_nothing() -> None:
    hidden = [ClientFinished(0, "a", None, None, 1.0), RoundFinished(0, 1, None, 1, 1, 0, 1.0)]
    assert figures.loss([history(hidden)]) == []


def test_metric_families_of_one_run_and_of_two(events: MakeEvents) -> None:
    one = history(events(rounds=10))
    nll, match = figures.metrics([one])
    assert (nll.title, names(nll)) == ("nll, per token", ["federated", "base", "local-only", "centralised"])
    assert trace(nll, "federated")["x"] == [5, 10]
    assert names(match)[:3] == ["federated", "private", "public"]
    assert trace(match, "private")["y"] == list(one.curve("exact_match/private").values())
    both = figures.metrics([one, replace(one, label="other")])
    assert [figure.title for figure in both] == ["nll, per token", "exact_match, per record"]
    assert [names(figure) for figure in both] == [["run", "other", "base"]] * 2  # the base models score the same
    assert trace(both[0], "base")["y"] == [one.evaluations["base"].metrics["nll"]] * 2
    apart = figures.metrics([one, history(events(rounds=5, speed=0.5), "other"), history([], "empty")])
    assert names(apart[0]) == ["run", "other", "base"]
    lower = [
        replace(e, metrics={"nll": 1.0}) if isinstance(e, Evaluated) and e.which == "base" else e for e in one.events
    ]
    assert names(figures.metrics([one, history(lower, "lower")])[0])[2:] == ["run base", "lower base"]


def test_the_round_axis_begins_and_ends_at_points(events: MakeEvents) -> None:
    (nll, _) = figures.metrics([history(events(rounds=10))])  # evaluated after rounds 5 and 10
    first, last = nll.layout["xaxis"]["range"]
    assert 4.5 < first < 5 and 10 < last < 10.5
    assert trace(nll, "base")["x"] == [first, last]


def test_a_single_round_shows_points(events: MakeEvents) -> None:
    made = events(rounds=1)
    for figure in everything([history(made)]):
        lines = [one for one in figure.traces if one["type"] == "scatter" and one["line"]["dash"] != "dot"]
        assert all(one["mode"] == "lines+markers" for one in lines)
    (figure,) = figures.loss([history(made)])
    assert len(figure.traces) == 5 and figure.layout["xaxis"]["range"] == [0.5, 1.5]
    assert [figure.title for figure in figures.traffic([history(made)])] == ["Bytes per round"]


def test_runs_side_by_side_always_have_a_legend(events: MakeEvents) -> None:
    """Also where one of them has nothing to show: a lone line does not say whose it is."""
    for figure in everything([history(events(rounds=2), "one"), history([], "two")]):
        if figure.traces[0]["type"] == "scatter":
            assert figure.layout["showlegend"]


def test_clients_stand_worst_first_whichever_way_is_better(events: MakeEvents) -> None:
    scores = {"a": {"nll": 1.0, "accuracy": 0.1}, "b": {"nll": 3.0, "accuracy": 0.9}, "c": {"nll": 2.0}}
    event = Evaluated("federated", 3, {"nll": 2.0, "accuracy": 0.5}, scores)
    nll, accuracy = figures.clients([history([event])])
    assert nll.traces[0]["customdata"] == ["b", "c", "a"]
    assert nll.traces[0]["x"] == [3.0, 2.0, 1.0]
    assert nll.layout["yaxis"]["ticktext"] == ["b", "c", "a"]
    assert accuracy.traces[0]["customdata"] == ["a", "b"]


SPLIT = {"nll": 2.0, "nll/x": 1.5, "nll/y": 2.5, "nll/z": 2.0}


def test_groups_share_one_figure(events: MakeEvents) -> None:
    """Nine groups are nine rows of one figure, the worst first, and not nine figures."""
    split = {"nll": 2.0, **{f"nll/{place}": 1.0 + place for place in range(9)}}
    settings = {"evaluation": {"by": "kind"}}
    started = RunStarted("a", "5e90c1d7", "serial", "model", 1, 2, 10, settings, {})
    run = history([started, Evaluated("base", 0, {"nll": 9.0, "nll/0": 7.0}), Evaluated("federated", 1, split)])
    (figure,) = groups.by_group([run])
    assert figure.title == "nll, per token, by kind"
    assert names(figure) == ["base", "federated"]
    assert trace(figure, "federated")["x"] == [float(9 - place) for place in range(9)]
    assert figure.layout["yaxis"]["ticktext"][0] == "8"
    assert trace(figure, "base")["x"] == [7.0] and trace(figure, "base")["y"] == [8]  # the row of group 0
    assert [figure.title for figure in figures.clients([run])] == []
    (several,) = groups.by_group([run, replace(run, label="other")])
    assert names(several) == ["run", "other"]


def test_clients_are_split_by_group_where_they_have_several() -> None:
    clients = {"a": {"nll": 1.0, "nll/x": 0.5, "nll/y": 1.5}, "b": {"nll": 3.0, "nll/y": 3.0}}
    (figure,) = groups.by_client_and_group(history([Evaluated("federated", 1, SPLIT, clients)]))
    assert figure.layout["yaxis"]["ticktext"] == ["b", "a"]
    assert (trace(figure, "x")["customdata"], trace(figure, "x")["x"]) == (["a"], [0.5])
    assert trace(figure, "y")["x"] == [3.0, 1.5]
    own = {"a": {"nll": 1.0, "nll/x": 1.0}, "b": {"nll": 3.0, "nll/y": 3.0}}  # split by the field of the clients
    assert groups.by_client_and_group(history([Evaluated("federated", 1, SPLIT, own)])) == []


def test_bytes_are_added_up_in_mebibytes() -> None:
    rounds = [RoundFinished(place, 1, 1.0, 2**20, 3 * 2**20, 1, 1.0) for place in range(3)]
    each, added = figures.traffic([history(list(rounds))])
    assert trace(each, "up")["y"] == [1.0, 1.0, 1.0]
    assert trace(added, "down")["y"] == [3.0, 6.0, 9.0]


def test_what_is_no_part_is_header() -> None:
    messages = [
        MessageSent(0, "work", "a", "down", 100, {"params": 90}),
        MessageSent(1, "evaluate", "a", "down", 100, {"params": 90}),
        MessageSent(0, "work", "a", "up", 50, {"delta": 40, "metrics": 4}),
        MessageSent(1, "work", "a", "up", 50, {"delta": 40, "metrics": 4}),
    ]
    assert list(figures.bytes_by_part(history(list(messages))).items()) == [
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
    assert everything([history([])]) == []
    assert figures.partition(DataReported({}, {})) == []


def test_points_that_are_not_finite_are_left_out(events: MakeEvents) -> None:
    broken = [
        replace(event, loss=math.nan) if isinstance(event, RoundFinished) and event.round == 2 else event
        for event in events(rounds=5)
    ]
    broken = [
        replace(event, drift=math.nan, cosine=None, cosines=(math.nan, *event.cosines[1:]))
        if isinstance(event, Diagnosed)
        else event
        for event in broken
    ]
    scores = {"nll": math.inf, "exact_match": 0.5}
    broken.append(Evaluated("federated", 5, scores, {"archive": {"nll": math.nan}, "clinic": {"nll": 2.0}}))
    drawn = everything([history(broken)])
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
    (figure,) = figures.clients([history([event])])
    assert figure.traces[0]["y"] == [0, 1]
