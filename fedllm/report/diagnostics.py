"""The section on what the server saw of the clients' updates: figures, the same in numbers, or why there are none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

from fedllm.events import Diagnosed, RoundFinished, RunStarted
from fedllm.report.formatting import figure, finite
from fedllm.report.markup import Html, table
from fedllm.report.plot import DASHES, SHADE, Figure, Trace, colour, line, matrix, over_rounds, squared
from fedllm.report.run_history import RunHistory

_FEW = 12  # clients whose lines an eye can still tell apart
_CURVES = {
    "cosine": (
        "Agreement of the updates",
        "Mean cosine over all pairs of clients. 1: all go the same way; 0: at right angles, with nothing in common; "
        "below 0: they pull against each other.",
    ),
    "effective_rank": (
        "Effective rank",
        "Directions that the shared adapter uses, by the entropy of its singular values; mean over layers.",
    ),
    "energy_above": (
        "Energy above the smallest rank",
        "What clients of the smallest rank are not sent of the shared adapter. Near 0: larger ranks are not used.",
    ),
}


def figures(histories: Sequence[RunHistory]) -> list[Figure]:
    """All pictures of the chapter; for one run with few clients also each client's drift."""
    curves = [
        over_rounds(title, note, traces, legend=len(histories) > 1)
        for field, (title, note) in _CURVES.items()
        if (
            traces := [
                trace
                for place, history in enumerate(histories)
                for trace in _curve(history, field, _shade(histories, place))
            ]
        )
    ]
    return [*_drift(histories), *curves[:1], *_bias(histories), *curves[1:], *_cosines(histories)]


def numbers(history: RunHistory) -> Html:
    """Every round in numbers."""
    found = history.of(Diagnosed)
    fields = (
        "drift",
        "cosine",
        "dissimilarity",
        "bias",
        "bias_of_means",
        "product_norm",
        "effective_rank",
        "energy_above",
    )
    shown = [name for name in fields if any(vars(event)[name] is not None for event in found)]
    rows = [[str(event.round + 1), *(figure(vars(event)[name]) for name in shown)] for event in found]
    head = ["round", *(name.replace("_", " ") for name in shown)]
    return table(f"What the updates of {history.label} showed, round by round", head, rows) if rows else Html("")


def absence(history: RunHistory) -> str:
    """Why a run shows nothing; empty if it does, or if its log does not tell."""
    started = history.last(RunStarted)
    if history.of(Diagnosed) or started is None or "diagnostics" not in started.settings.get("evaluation", {}):
        return ""
    if started.settings["evaluation"]["diagnostics"] is None:
        return "Not computed: evaluation.diagnostics is null."
    if started.settings.get("demands", {}).get("secrecy"):
        return (
            "Not computed: the server may learn nothing but sums of updates (demands.secrecy). So this page has no "
            "drift, no cosines and no bias of the aggregation, and of a single client no loss, no tokens, no bytes of "
            "its parts and no scores: neither the worst client nor any other."
        )
    if any(not event.note for event in history.of(RoundFinished)):
        return "Not computed: the updates are hidden from the server, or are integers that no stage has converted back."
    return ""


def _shade(histories: Sequence[RunHistory], place: int) -> str:
    return SHADE["federated"] if len(histories) == 1 else colour(place)


def _curve(history: RunHistory, field: str, shade: str, *, name: str = "", dash: str = "solid") -> list[Trace]:
    """A line of one field by rounds; none where no round has it."""
    trace = line(
        name or history.label, {e.round + 1: vars(e)[field] for e in history.of(Diagnosed)}, shade=shade, dash=dash
    )
    return [trace] if trace["x"] else []


def _drift(histories: Sequence[RunHistory]) -> list[Figure]:
    traces = _client_drifts(histories[0]) if len(histories) == 1 else []
    for place, history in enumerate(histories):
        name = "mean" if len(histories) == 1 else history.label
        traces += _curve(history, "drift", _shade(histories, place), name=name)
    note = "How far clients went in a round: the norm of each update, as the server received it."
    return [over_rounds("Drift", note, traces, from_zero=True, legend=len(histories) > 1)] if traces else []


def _client_drifts(history: RunHistory) -> list[Trace]:
    seen: dict[str, dict[int, float | None]] = {}
    for event in history.of(Diagnosed):
        for client, drift in event.clients.items():
            seen.setdefault(client, {})[event.round + 1] = drift
    if len(seen) > _FEW:
        return []
    shades = enumerate(seen.items())
    return [line(client, points, shade=colour(place + 1), thin=True) for place, (client, points) in shades]


def _bias(histories: Sequence[RunHistory]) -> list[Figure]:
    """One run: beside what the mean of the factors would lose."""
    traces: list[Trace] = []
    for place, history in enumerate(histories):
        name = "this run" if len(histories) == 1 else history.label
        traces += _curve(history, "bias", _shade(histories, place), name=name)
    if len(histories) == 1:
        traces += _curve(histories[0], "bias_of_means", SHADE["base"], name="mean of the factors", dash=DASHES[1])
    note = "What the aggregation loses of the mean of the clients' products B A, relative to it."
    return [over_rounds("Aggregation bias", note, traces, from_zero=True, legend=True)] if traces else []


def _cosines(histories: Sequence[RunHistory]) -> list[Figure]:
    """The newest matrix of each run."""
    found: list[Figure] = []
    for history in histories:
        event = next((event for event in reversed(history.of(Diagnosed)) if any(map(finite, event.cosines))), None)
        if event is None:
            continue
        names = list(event.clients)
        values = dict(zip(combinations(range(len(names)), 2), event.cosines, strict=True))
        title = f"Cosines in round {event.round + 1}" + ("" if len(histories) == 1 else f", {history.label}")
        note = "Between the updates of each pair of clients: blue together, red against each other."
        found.append(squared(title, note, matrix(names, _full(len(names), values)), rows=names))
    return found


def _full(count: int, upper: Mapping[tuple[int, int], float | None]) -> list[list[float | None]]:
    """Both triangles; nothing on the diagonal or where a cosine is not finite."""
    known = {pair: value for pair, value in upper.items() if finite(value)}
    return [[known.get((min(i, j), max(i, j))) for j in range(count)] for i in range(count)]
