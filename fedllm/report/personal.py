"""The clients' own models: what each client gains by them, how far apart they are, and whose model suits whom."""

from __future__ import annotations

from collections.abc import Sequence

from fedllm.events import PersonalEvaluated
from fedllm.report.fairness import client_gains, means, spread
from fedllm.report.figures import worst_first
from fedllm.report.formatting import NOTHING, figure
from fedllm.report.markup import Html, el, folded, joined, table
from fedllm.report.plot import SHADE, Figure, bars, by_rows
from fedllm.report.run_history import RunHistory, client_scores

GAINS = {"local_only": "over training alone", "fedavg": "over FedAvg, which shares everything"}
FEW = 12  # clients whose square of figures a page can hold


def gains(histories: Sequence[RunHistory]) -> list[Figure]:
    """Of one run, each client's gains over training alone and over the plain federated model; a figure per metric."""
    found = histories[0].evaluations if len(histories) == 1 else {}
    after = found.get("federated")
    if after is None:
        return []
    made = []
    for metric in [name for name in after.metrics if "/" not in name]:
        columns = {
            which: gained for which in GAINS if which in found and (gained := client_gains(metric, found[which], after))
        }
        if not columns:
            continue
        first = next(iter(columns.values()))
        rows = worst_first("gain", first, first)  # the smallest gain on top
        traces = [bars(GAINS[which], rows, gained, shade=SHADE[which]) for which, gained in columns.items()]
        note = (
            f"By how much the client's own figure is better than in the other model; left of 0 it is worse "
            f"({metric}, smallest gain first)."
        )
        made.append(by_rows(f"Gain in {metric} of each client", note, traces, rows=rows, legend=True))
    return made


def numbers(history: RunHistory, *, named: bool) -> list[Html]:
    """The spread over clients, on whose records which figure, and of few clients every model on every test set."""
    event, after = history.last(PersonalEvaluated), history.evaluations.get("federated")
    if event is None:
        return []
    of = f" of {history.label}" if named else ""
    metrics = dict.fromkeys(name for client, row in event.matrix.items() for name in row[client] if "/" not in name)
    rows, squares = [], []
    for metric in metrics:
        own = client_scores(after, metric) if after is not None else {}
        if not own:
            continue
        told = spread(metric, own)
        values = (told["mean"], means(event.others, metric), means(event.union, metric), told["worst"], told["std"])
        rows.append([metric, *map(figure, (*values, told["gap"]))])
        squares += [_square(event, metric)] if len(event.matrix) <= FEW else []
    head = ["metric", "own records", "others' records", "all records", "worst client", "std over clients", "worst-best"]
    seen = (
        ""
        if len(event.matrix) == event.population
        else (f" On others' and all records: {len(event.matrix)} of {event.population} clients, spread evenly.")
    )
    words = el("p.kind", f"Means over clients; a smaller spread is fairer.{seen}")
    if not rows:
        return []
    return [
        joined([table(f"The clients' own models{of}", head, rows), words]),
        *([folded(f"Every model{of} on every client's records", joined(squares))] if squares else []),
    ]


def _square(event: PersonalEvaluated, metric: str) -> Html:
    clients = list(event.matrix)
    rows = [[model, *(figure(event.matrix[model][who].get(metric)) for who in clients)] for model in clients]
    return table(f"{metric}: a row a model, a column whose records", ["model", *clients], rows or [[NOTHING]])
