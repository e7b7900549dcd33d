"""The figures of `evaluation.by`: final figures of each group of records, in one figure per metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedllm.report.figures import FEW, better, families, worst_first
from fedllm.report.formatting import finite, labelled
from fedllm.report.plot import SHADE, Figure, bars, by_rows, colour
from fedllm.report.run_history import COMPARED, RunHistory, client_scores

Scores = Mapping[str, float | None]


def by_group(histories: Sequence[RunHistory]) -> list[Figure]:
    """A row for each group: one run's models beside each other, or the federated models of several runs."""
    return [
        figure
        for metric, groups in families(histories).items()
        if len(groups) > 1
        for figure in _group_bars(histories, metric, groups)
    ]


def _group_bars(histories: Sequence[RunHistory], metric: str, groups: Sequence[str]) -> list[Figure]:
    if len(histories) == 1:
        found = [(COMPARED[which], SHADE[which], event) for which, event in histories[0].evaluations.items()]
    else:
        finals = [(history.label, colour(place), history.evaluations) for place, history in enumerate(histories)]
        found = [(label, shade, events["federated"]) for label, shade, events in finals if "federated" in events]
    scores = [(name, shade, _of_groups(event.metrics, metric, groups)) for name, shade, event in found]
    scores = [one for one in scores if one[2]]
    if not scores:
        return []
    order = max(scores, key=lambda one: one[0] == COMPARED["federated"])[2]
    rows = worst_first(metric, [group for group in groups if any(group in one[2] for one in scores)], order)
    traces = [bars(name, rows, values, shade=shade) for name, shade, values in scores]
    by = ", ".join(dict.fromkeys(history.by for history in histories))
    note = f"All held-out records of each {by} together, the worst first ({better(metric)} is better)."
    return [by_rows(f"{labelled(metric)}, by {by}", note, traces, rows=rows, legend=len(histories) > 1)]


def by_client_and_group(history: RunHistory) -> list[Figure]:
    """The federated model on each client's records of each group; nothing where no client has several groups, or where
    there are too many groups to tell apart."""
    event = history.evaluations.get("federated")
    if event is None:
        return []
    drawn = []
    for metric, groups in families([history]).items():
        parts = {group: client_scores(event, f"{metric}/{group}") for group in groups}
        rows = worst_first(metric, event.clients, client_scores(event, metric))
        most = max((sum(client in found for found in parts.values()) for client in rows), default=0)
        if most < 2 or len(groups) > FEW:
            continue
        traces = [bars(group, rows, parts[group], shade=colour(place + 4)) for place, group in enumerate(groups)]
        note = (
            f"The federated model on each client's own held-out records, by {history.by} ({better(metric)} is better)."
        )
        drawn.append(by_rows(f"{metric} by client and {history.by}", note, traces, rows=rows))
    return drawn


def _of_groups(metrics: Scores, metric: str, groups: Sequence[str]) -> dict[str, float]:
    found = {group: metrics.get(f"{metric}/{group}") for group in groups}
    return {group: value for group, value in found.items() if finite(value)}
