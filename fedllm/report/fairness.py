"""Whether a method serves every client: spread over clients, and gains over what each would have without it.

    spread    mean, standard deviation (over the clients that there are) and worst-best gap of the clients' own figures
    gain      of a client: by how much its own figure is better than in another model; positive is better, whatever the
              metric
    better    share of the clients with a gain above 0

Li et al. 2020 (q-FFL), arXiv:1905.10497: of two models the one with the smaller spread over the clients is
fairer in performance.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean, pstdev
from typing import Any

from fedllm.events import Evaluated, PersonalEvaluated
from fedllm.report.formatting import finite, lower_is_better
from fedllm.report.run_history import client_scores

BETTER_THAN = {"local_only": "training alone", "fedavg": "the plain federated model (FedAvg)"}


def spread(metric: str, scores: Mapping[str, float]) -> dict[str, Any]:
    """Mean, standard deviation, worst and best of the clients' figures, the gap between these, and who is worst."""
    order = sorted(scores, key=lambda client: scores[client], reverse=lower_is_better(metric))
    values = list(scores.values())
    worst, best = scores[order[0]], scores[order[-1]]
    return {"mean": fmean(values), "std": pstdev(values), "worst": worst, "best": best, "gap": abs(best - worst),
            "worst_client": order[0]}  # fmt: skip


def client_gains(metric: str, before: Evaluated, after: Evaluated) -> dict[str, float]:
    """By how much each client's own figure is better in `after`; of those that have both."""
    one, two = client_scores(before, metric), client_scores(after, metric)
    sign = -1 if lower_is_better(metric) else 1
    return {client: sign * (two[client] - one[client]) for client in one if client in two}


def better_off(gains: Mapping[str, float]) -> float:
    """The share of the clients that gain."""
    return sum(gain > 0 for gain in gains.values()) / len(gains)


def means(scores: Mapping[str, Mapping[str, float | None]], metric: str) -> float | None:
    """The mean over clients of a figure; None where nobody has one."""
    found = [value for figures in scores.values() if finite(value := figures.get(metric))]
    return fmean(found) if found else None


def personal_summary(event: PersonalEvaluated, evaluated: Mapping[str, Evaluated]) -> dict[str, Any]:
    """The part `personal` of `summary.json`: by metric, and by client."""
    own = {client: row[client] for client, row in event.matrix.items()}
    metrics = list(dict.fromkeys(name for figures in own.values() for name in figures if "/" not in name))
    everyone = evaluated.get("federated")
    found: dict[str, Any] = {}
    for metric in metrics:
        # the models of all clients where the run has them, else of those that were looked at
        scores = client_scores(everyone, metric) if everyone is not None else {}
        scores = scores or {client: value for client, row in own.items() if finite(value := row.get(metric))}
        found[metric] = {
            "own": spread(metric, scores) if scores else None,
            "others": means(event.others, metric),
            "all": means(event.union, metric),
            "better_than": better_than(metric, evaluated),
        }
    by_client = {
        client: {"own": dict(own[client]), "others": dict(event.others[client]), "all": dict(event.union[client])}
        for client in own
    }
    return {"metrics": found, "clients": by_client, "population": event.population}


def better_than(metric: str, evaluated: Mapping[str, Evaluated]) -> dict[str, float]:
    """The share of clients better off than with each baseline that the run has."""
    after = evaluated.get("federated")
    gains = {
        which: client_gains(metric, evaluated[which], after)
        for which in BETTER_THAN
        if after is not None and which in evaluated
    }
    return {which: better_off(found) for which, found in gains.items() if found}
