"""The figures of one or several runs as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from fedllm.events import (
    DataReported,
    EngineChosen,
    Evaluated,
    MessageSent,
    RoundFinished,
    RunFinished,
    RunStarted,
    Warned,
)
from fedllm.report.fairness import BETTER_THAN, client_gains
from fedllm.report.figures import bytes_by_part
from fedllm.report.formatting import NOTHING, duration, figure, labelled, lower_is_better, part_of_whole, share, size
from fedllm.report.markup import Html, el, folded, joined, table
from fedllm.report.run_history import COMPARED, RunHistory, client_metrics, client_scores

_LONG = 24  # rows of a table that a reader still looks through
_MEANS = (
    "means over the held-out tokens, or records, of all clients together; a client with more of them counts for more"
)


def headline(histories: Sequence[RunHistory]) -> Html:
    """Every metric of the base model, of local training, of the federation and of pooled data."""
    found = [history.figures for history in histories]
    metrics = list(dict.fromkeys(name for models in found for scores in models.values() for name in scores))
    if not metrics:
        return el("p", "Nothing was evaluated.")
    models = list(dict.fromkeys(model for one in found for model in one))
    if len(histories) == 1:
        head = ["metric", *models]
        rows = [[labelled(name), *(figure(found[0][model].get(name)) for model in models)] for name in metrics]
    else:
        head = ["metric", "model", *(history.label for history in histories)]
        rows = [
            [labelled(name), model, *(figure(one.get(model, {}).get(name)) for one in found)]
            for name in metrics
            for model in models
            if any(name in one.get(model, {}) for one in found)
        ]
    return joined([*_whole_first("Final figures", head, rows), _notes(histories)])


def _whole_first(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[Html]:
    """A table; where it is long, the rows of groups (`nll/private`) in one of their own that opens on demand."""
    whole = [row for row in rows if "/" not in row[0]]
    if len(rows) <= _LONG or not whole:
        return [table(caption, head, rows)]
    groups = [row for row in rows if "/" in row[0]]
    return [table(caption, head, whole), *_folded_rows(f"{caption} of each group", head, groups)]


def _folded_rows(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[Html]:
    return [folded(caption, table(caption, head, rows))] if rows else []


def _notes(histories: Sequence[RunHistory]) -> Html:
    """What each evaluation says of itself; runs that say the same share a line."""
    said: dict[tuple[str, str], list[str]] = {}
    for history in histories:
        for which, event in history.evaluations.items():
            after = f" after round {event.round}" if which == "federated" else ""
            if event.note or after:
                said.setdefault((which, after + (f": {event.note}" if event.note else "")), []).append(history.label)
    lines = [
        el("li", el("b", COMPARED[which]), text, f" ({', '.join(names)})" if len(names) < len(histories) else "")
        for (which, text), names in sorted(said.items(), key=lambda item: list(COMPARED).index(item[0][0]))
    ]
    lines.insert(0, el("li", el("b", "per token, per record"), f": {_MEANS}"))
    if any("local-only" in history.figures for history in histories):
        lines.append(el("li", el("b", "local-only"), " is the mean over the clients of what their models score"))
    if any(model.endswith(", own") for history in histories for model in history.figures):
        text = ": each client's model on its own held-out records; else on everybody's"
        lines.append(el("li", el("b", "own"), text))
    return el("ul.notes", *lines) if lines else Html("")


def overview(histories: Sequence[RunHistory]) -> Html:
    """One column per run: what it is, what it cost."""
    described = [_described(history) for history in histories]
    names = list(dict.fromkeys(name for items in described for name in items))
    rows = [[name, *(items.get(name, NOTHING) for items in described)] for name in names]
    return table("The runs side by side", ["", *(history.label for history in histories)], rows, figures=False)


def _described(history: RunHistory) -> dict[str, str]:
    started = history.last(RunStarted)
    known = {
        "base model": history.model,
        "engine": _engine(history),
        "clients": figure(started.clients) if started else NOTHING,
        "trainable parameters": figure(started.trainable) if started else NOTHING,
        "experiment hash": started.experiment_hash[:8] if started else NOTHING,
        "end": ending(history),
    }
    return {**known, **costs(history)}


def _engine(history: RunHistory) -> str:
    """Which engine ran, and why."""
    started, chosen = history.last(RunStarted), history.last(EngineChosen)
    if chosen is not None:
        return f"{chosen.engine} ({chosen.reason})"
    return started.engine if started else NOTHING


def ending(history: RunHistory) -> str:
    """How the run ended, in a few words."""
    started, finished = history.last(RunStarted), history.last(RunFinished)
    planned = f" of {started.rounds}" if started else ""
    if finished is None:
        return f"not finished: {len(history.of(RoundFinished))}{planned} rounds"
    return f"{finished.rounds}{planned} rounds" + (f": {finished.note}" if finished.note else "")


def costs(history: RunHistory) -> dict[str, str]:
    """Bytes, time, speed, memory and privacy of a run; what nobody measured is left out."""
    rounds, summary = history.of(RoundFinished), history.summary
    time, tokens = history.total("seconds"), history.total("tokens")
    pace = summary.get("seconds_per_round") or (fmean(event.seconds for event in rounds) if rounds else None)
    speed = summary.get("tokens_per_second") or (tokens / time if tokens and time else None)
    scoring = sum(event.bytes for event in history.of(MessageSent) if event.call == "evaluate")
    items: dict[str, Any] = {
        "sent up": (size, history.total("bytes_up")),
        "sent down": (size, history.total("bytes_down")),
        "sent for evaluation": (size, summary.get("evaluation_bytes", scoring or None)),
        "time": (duration, time),
        "time per round": (duration, pace),
        "tokens trained": (figure, tokens),
        "tokens per second": (figure, round(speed, 1) if speed else None),
        "share of the matrix peak": (part_of_whole, summary.get("share_of_peak")),
        "peak memory": (size, summary.get("peak_rss_bytes")),
        "epsilon": (figure, summary.get("epsilon")),
        "best round": (figure, summary.get("best_round")),
    }
    return {name: spell(value) for name, (spell, value) in items.items() if value is not None}


def cost(history: RunHistory) -> Html:
    """`costs` as a table."""
    items = costs(history)
    return table("What it took", ["", "whole run"], [list(item) for item in items.items()]) if items else Html("")


def worst(histories: Sequence[RunHistory]) -> list[Html]:
    """How the clients fare: the worst one, the mean, the best; of several runs under the federated model alone. Groups
    that only one client has are left out."""
    rows = []
    for history in histories:
        for which, event in history.evaluations.items():
            if len(histories) > 1 and which != "federated":
                continue
            name = COMPARED[which] if len(histories) == 1 else history.label
            for metric in client_metrics(event):
                found = client_scores(event, metric)
                if len(found) > ("/" in metric):
                    rows.append([metric, name, *_spread(metric, found)])
    order = list(dict.fromkeys(row[0] for row in rows))
    rows.sort(key=lambda row: order.index(row[0]))
    head = [
        "metric",
        "model" if len(histories) == 1 else "run",
        "worst client",
        "worst",
        "mean of clients",
        "best",
        "best client",
    ]
    return _whole_first("Best and worst served clients", head, rows) if rows else []


def _spread(metric: str, found: Mapping[str, float]) -> list[str]:
    order = sorted(found, key=lambda client: found[client], reverse=lower_is_better(metric))
    first, last = order[0], order[-1]
    names = (first, last) if found[first] != found[last] else (NOTHING, NOTHING)
    return [names[0], figure(found[first]), figure(fmean(found.values())), figure(found[last]), names[1]]


def gains(history: RunHistory) -> Html:
    """For how many clients the federation beats training alone, and the model that shares everything."""
    found, together = history.evaluations, history.evaluations.get("federated")
    said = []
    for which, title in BETTER_THAN.items():
        if which not in found or together is None:
            continue
        counts = [(name, client_gains(name, found[which], together)) for name in together.metrics if "/" not in name]
        told = [f"{sum(g > 0 for g in gain.values())} of {len(gain)} in {name}" for name, gain in counts if gain]
        if told:
            said.append(el("p", f"Clients that the federation serves better than {title}: {', '.join(told)}."))
    return joined(said)


def spending(histories: Sequence[RunHistory]) -> Html:
    """Bytes by direction and part."""
    rows = []
    for history in histories:
        spent = bytes_by_part(history)
        sums = {side: sum(n for (direction, _), n in spent.items() if direction == side) for side, _ in spent}
        for (side, part), amount in spent.items():
            name = side if len(histories) == 1 else f"{history.label} {side}"
            rows.append([name, part, size(amount), share(amount, sums[side])])
    return table("Share of each part", ["direction", "part", "bytes", "share"], rows) if rows else Html("")


def records(data: DataReported) -> Html:
    """What became of the records."""
    spread = "" if data.divergence is None else figure(data.divergence)
    rows = [
        ["clients", figure(len(data.train))],
        ["training records", figure(sum(data.train.values()))],
        ["held-out records", figure(sum(data.heldout.values()))],
        ["label divergence (Jensen-Shannon, 0 alike to 1 disjoint)", spread or NOTHING],
        ["records that no client holds", figure(data.left_out)],
        ["examples cut to the longest length", figure(data.cut)],
        ["examples dropped, no label left", figure(data.dropped)],
        ["held-out examples cut to the longest length", figure(data.heldout_cut)],
        ["held-out examples not scored, too long", figure(data.heldout_dropped + data.heldout_choices)],
    ]
    return table("What became of the records", ["", "count"], rows)


def troubles(history: RunHistory) -> Html:
    """Lost clients and warnings."""
    failed = [list(loss) for loss in history.lost]
    warned = list(dict.fromkeys(event.text for event in history.of(Warned)))
    notes = [f"Round {event.round + 1}: {event.note}" for event in history.of(RoundFinished) if event.note]
    shown: list[Html] = []
    if failed:
        lost = table(f"Lost clients ({len(failed)})", ["when", "client", "reason"], failed)
        shown.append(lost if len(failed) <= 20 else folded(f"{len(failed)} clients were lost", lost))
    if warned or notes:
        shown.append(el("ul.notes", *(el("li", text) for text in [*warned, *notes])))
    return joined(shown) if shown else el("p", "No client was lost, and there were no warnings.")


def rounds(history: RunHistory) -> Html:
    """Every round in numbers."""
    finished = history.of(RoundFinished)
    curves = {name: history.curve(name) for event in history.of(Evaluated) for name in event.metrics}
    curves = {name: points for name, points in curves.items() if points}
    rows = [
        [
            str(event.round + 1),
            figure(event.clients),
            figure(event.loss),
            *(figure(points.get(event.round + 1)) for points in curves.values()),
            size(event.bytes_up),
            size(event.bytes_down),
            figure(event.tokens),
            duration(event.seconds),
        ]
        for event in finished
    ]
    head = ["round", "clients", "loss", *curves, "up", "down", "tokens", "time"]
    return table(f"{history.label}, round by round", head, rows) if rows else Html("")


def versions(histories: Sequence[RunHistory]) -> Html:
    """The software that ran."""
    found = [started.versions if (started := history.last(RunStarted)) else {} for history in histories]
    names = list(dict.fromkeys(name for versions in found for name in versions))
    rows = [[name, *(str(versions.get(name, NOTHING)) for versions in found)] for name in names]
    head = ["", *(["version"] if len(histories) == 1 else [history.label for history in histories])]
    return table("Versions", head, rows, figures=False) if rows else Html("")


def differences(histories: Sequence[RunHistory]) -> Html:
    """The settings in which the runs differ, one column per run."""
    flat = [_flat(started.settings) if (started := history.last(RunStarted)) else {} for history in histories]
    keys = list(dict.fromkeys(key for settings in flat for key in settings))
    rows = [
        [key, *(settings.get(key, NOTHING) for settings in flat)]
        for key in keys
        if len({settings.get(key) for settings in flat}) > 1
    ]
    if not rows:
        return el("p", "All settings are equal.")
    return table("Settings that differ", ["setting", *(history.label for history in histories)], rows, figures=False)


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(value, Mapping) and value:
        children = [(f"{prefix}.{key}" if prefix else str(key), child) for key, child in value.items()]
    elif isinstance(value, list) and value:
        children = [(f"{prefix}[{place}]", child) for place, child in enumerate(value)]
    else:
        return {prefix: "null" if value is None else str(value)}
    return {key: text for name, child in children for key, text in _flat(child, name).items()}
