"""The figures of a report. Each function takes the runs, one line or bar group a run, and returns the figures that
their events can fill: none where nothing was recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate

from fedllm.events import ClientFinished, DataReported, Evaluated, MessageSent, RoundFinished
from fedllm.report.formatting import finite, labelled, lower_is_better
from fedllm.report.plot import DASHES, SHADE, Figure, Trace, bars, by_rows, colour, columns, level, line, over_rounds
from fedllm.report.run_history import COMPARED, OWN, RunHistory, client_metrics, client_scores

_MIB = 2**20
FEW = 12  # lines or labels that an eye can still tell apart


def loss(histories: Sequence[RunHistory]) -> list[Figure]:
    """Training loss of each round; for one run with few clients also each client's own."""
    traces: list[Trace] = []
    if len(histories) == 1:
        traces += _client_losses(histories[0])
    for place, history in enumerate(histories):
        name = "all clients" if traces and len(histories) == 1 else history.label
        shade = SHADE["federated"] if len(histories) == 1 else colour(place)
        traces.append(line(name, {e.round + 1: e.loss for e in history.of(RoundFinished)}, shade=shade))
    if not any(trace["x"] for trace in traces):
        return []
    note = "Mean over each round's clients of the loss during local training; what an aggregator hides is missing."
    return [over_rounds("Training loss", note, traces, legend=len(histories) > 1)]


def _client_losses(history: RunHistory) -> list[Trace]:
    seen: dict[str, dict[int, float | None]] = {}
    for event in history.of(ClientFinished):
        if finite(event.loss):
            seen.setdefault(event.client, {})[event.round + 1] = event.loss
    if len(seen) > FEW:
        return []
    return [
        line(client, points, shade=colour(place + 1), thin=True) for place, (client, points) in enumerate(seen.items())
    ]


def metrics(histories: Sequence[RunHistory]) -> list[Figure]:
    """A figure per metric. One run: the lines of a few groups (`exact_match/private`), the levels of the base model and
    of the baselines. Several runs: a line each, and the base model's level."""
    note = "{} is better. The shared model on held-out records."
    return [
        over_rounds(
            labelled(metric),
            note.format(better(metric).capitalize()),
            traces,
            levels=_levels(histories, metric),
            legend=len(histories) > 1,
        )
        for metric, groups in families(histories).items()
        if (traces := _curves(histories, metric, groups))
    ]


def families(histories: Sequence[RunHistory]) -> dict[str, list[str]]:
    """The metrics of all evaluations, and for each the groups that `evaluation.by` splits it into."""
    names = dict.fromkeys(name for history in histories for event in history.of(Evaluated) for name in event.metrics)
    found: dict[str, list[str]] = {}
    for name in names:
        metric, split, group = name.removeprefix(OWN).partition("/")
        groups = found.setdefault(metric, [])
        if split and group not in groups:
            groups.append(group)
    return found


def _curves(histories: Sequence[RunHistory], metric: str, groups: Sequence[str]) -> list[Trace]:
    if len(histories) > 1:
        curves = [(history.label, history.curve(metric), colour(place)) for place, history in enumerate(histories)]
    else:
        shown = groups if len(groups) <= FEW else []
        curves = [("federated", histories[0].curve(metric), SHADE["federated"])]
        curves += [
            (name, histories[0].curve(f"{metric}/{name}"), colour(place + 4)) for place, name in enumerate(shown)
        ]
    return [line(title, dict(points), shade=shade) for title, points, shade in curves if points]


def _levels(histories: Sequence[RunHistory], metric: str) -> list[Trace]:
    """One run: of all that it is compared with. Several: of the base models, one line where they score the same."""
    if len(histories) == 1:
        return [
            level(COMPARED[which], value, shade=SHADE[which])
            for which, event in histories[0].evaluations.items()
            if which != "federated" and finite(value := event.metrics.get(metric))
        ]
    bases = [(place, history.label, history.evaluations.get("base")) for place, history in enumerate(histories)]
    found = [(place, label, event.metrics.get(metric)) for place, label, event in bases if event]
    scores = [(place, label, value) for place, label, value in found if finite(value)]
    if len({value for _, _, value in scores}) == 1:
        return [level(COMPARED["base"], scores[0][2], shade=SHADE["base"])]
    return [level(f"{label} {COMPARED['base']}", value, shade=colour(place)) for place, label, value in scores]


def clients(histories: Sequence[RunHistory]) -> list[Figure]:
    """The final evaluation of every client, worst first: one run beside its baselines, or several runs."""
    events = [event for history in histories for event in history.evaluations.values()]
    names = dict.fromkeys(name for event in events for name in client_metrics(event) if "/" not in name)
    return [figure for name in names for figure in _client_bars(histories, name)]


def _client_bars(histories: Sequence[RunHistory], metric: str) -> list[Figure]:
    if len(histories) == 1:
        groups = [(COMPARED[which], SHADE[which], event) for which, event in histories[0].evaluations.items()]
    else:
        found = [(history.label, colour(place), history.evaluations) for place, history in enumerate(histories)]
        groups = [(name, shade, event["federated"]) for name, shade, event in found if "federated" in event]
    scores = [(name, shade, client_scores(event, metric)) for name, shade, event in groups]
    scores = [group for group in scores if group[2]]
    if not scores:
        return []
    order = max(scores, key=lambda group: group[0] == "federated")[2]
    everyone = dict.fromkeys(client for _, _, found in scores for client in found)
    rows = worst_first(metric, everyone, order)
    traces = [bars(name, rows, found, shade=shade) for name, shade, found in scores]
    note = f"Each client's own held-out records, worst client first ({better(metric)} is better)."
    return [by_rows(f"{metric} by client", note, traces, rows=rows, legend=len(histories) > 1)]


def better(metric: str) -> str:
    """Which value of a metric is the better one."""
    return "lower" if lower_is_better(metric) else "higher"


def worst_first(metric: str, names: Iterable[str], scores: Mapping[str, float]) -> list[str]:
    """Names by their score, the worst first; those without one last."""
    sign = -1 if lower_is_better(metric) else 1
    return sorted(names, key=lambda name: sign * scores[name] if name in scores else float("inf"))


def traffic(histories: Sequence[RunHistory]) -> list[Figure]:
    """Bytes of each round, and of all rounds so far where there are several."""
    each = "Serialised messages of the round's clients, headers included."
    several = any(len(history.of(RoundFinished)) > 1 for history in histories)
    added = _directions(histories, "Bytes so far", "The same, added up.", accumulate) if several else []
    return [*_directions(histories, "Bytes per round", each, iter), *added]


def _directions(
    histories: Sequence[RunHistory], title: str, note: str, turn: Callable[[list[int]], Iterable[int]]
) -> list[Figure]:
    traces: list[Trace] = []
    for place, history in enumerate(histories):
        finished = history.of(RoundFinished)
        sides = {"up": [e.bytes_up for e in finished], "down": [e.bytes_down for e in finished]}
        for side, (direction, values) in enumerate(sides.items()):
            points = {e.round + 1: value / _MIB for e, value in zip(finished, turn(values), strict=True)}
            name = direction if len(histories) == 1 else f"{history.label} {direction}"
            shade = colour(side if len(histories) == 1 else place)
            if points:
                traces.append(line(name, dict(points), shade=shade, dash=DASHES[side]))
    legend = len(histories) > 1
    return [over_rounds(title, note, traces, unit="MiB", from_zero=True, legend=legend)] if traces else []


def parts(histories: Sequence[RunHistory]) -> list[Figure]:
    """What the bytes were spent on: one bar per run and direction, cut into parts and headers."""
    rows: list[str] = []
    spent: dict[str, dict[str, float]] = {}
    for history in histories:
        for (direction, part), amount in bytes_by_part(history).items():
            row = direction if len(histories) == 1 else f"{history.label} {direction}"
            rows = rows if row in rows else [*rows, row]
            spent.setdefault(part, {})[row] = amount / _MIB
    if not rows:
        return []
    traces = [bars(part, rows, amounts, shade=colour(place)) for place, (part, amounts) in enumerate(spent.items())]
    note = "All messages of the rounds by what they carry; headers are names, shapes and framing."
    return [by_rows("Bytes by part", note, traces, rows=rows, unit="MiB", stacked=True)]


def bytes_by_part(history: RunHistory) -> dict[tuple[str, str], int]:
    """Bytes by (direction, part); what is no part's is the headers'. Evaluations are left out; up comes first, then the
    largest."""
    spent: dict[tuple[str, str], int] = {}
    for event in history.of(MessageSent):
        if event.call == "evaluate":
            continue
        rest = event.bytes - sum(event.parts.values())
        for part, amount in {**event.parts, "headers": rest}.items():
            spent[event.direction, part] = spent.get((event.direction, part), 0) + amount
    return dict(sorted(spent.items(), key=lambda item: (item[0][0] != "up", -item[1])))


def partition(data: DataReported) -> list[Figure]:
    """Records of every client: training records stacked by label where there are labels, else beside held-out ones."""
    rows = list(data.train)
    if not rows:
        return []
    totals: dict[str, int] = {}
    for counts in data.labels.values():
        for label, count in counts.items():
            totals[label] = totals.get(label, 0) + count
    if not totals:
        groups = {"training": dict(data.train), "held out": dict(data.heldout)}
        note = "Records that each client trains on, and those that are held out to evaluate it."
    else:
        kept = sorted(totals, key=lambda label: -totals[label])[: FEW - 1 if len(totals) > FEW else FEW]
        groups = {label: {client: data.labels.get(client, {}).get(label, 0) for client in rows} for label in kept}
        if len(totals) > len(kept):
            groups["all other labels"] = {
                client: sum(count for label, count in data.labels.get(client, {}).items() if label not in groups)
                for client in rows
            }
        note = "Records of each client by label."
    traces = [
        bars(name, rows, {client: float(count) for client, count in counts.items()}, shade=colour(place))
        for place, (name, counts) in enumerate(groups.items())
    ]
    return [by_rows("Records by client", note, traces, rows=rows, unit="records", stacked=True)]


def seconds(histories: Sequence[RunHistory]) -> list[Figure]:
    """Wall-clock time of each round."""
    timed = [(history.label, {e.round + 1: e.seconds for e in history.of(RoundFinished)}) for history in histories]
    if not any(values for _, values in timed):
        return []
    if len(timed) == 1:
        traces = [columns("seconds", timed[0][1], shade=SHADE["federated"])]
    else:
        traces = [line(name, dict(values), shade=colour(place)) for place, (name, values) in enumerate(timed)]
    note = "From drawing the cohort to the merged model."
    return [over_rounds("Time per round", note, traces, unit="seconds", from_zero=True, legend=len(histories) > 1)]
