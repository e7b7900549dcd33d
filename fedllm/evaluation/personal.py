"""Models of clients on each other's test sets.

    own      a client's model on its own held-out records
    others   on those of all other clients together
    all      on everybody's, its own included

Sums and counts are added up, so that a token, or a record, counts the same whoever holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from fedllm.data.federation import ConcatRecords
from fedllm.errors import Record
from fedllm.evaluation.scores import Scorer
from fedllm.models.loaded_model import LoadedModel
from fedllm.tensors.tree import Tree, add

Scores = dict[str, float]


def sums_by_client(
    scorer: Scorer, model: LoadedModel, params: Tree, heldout: Mapping[str, Sequence[Record]]
) -> dict[str, Tree]:
    """One set of parameters on all held-out records, by client; a record that many hold is scored once."""
    owned = {client: scorer.chosen(records) for client, records in heldout.items()}
    pairs = scorer.pairs(model, params, ConcatRecords(owned.values()))
    found: dict[str, Tree] = {}
    start = 0
    for client, records in owned.items():
        mine = slice(start, start + len(records))
        found[client] = scorer.add_up(records, {metric: rows[mine] for metric, rows in pairs.items()})
        start = mine.stop
    return found


def added_up(sums: Mapping[str, Tree], clients: Iterable[str]) -> Tree:
    """The sums over some clients' test sets."""
    total: Tree = {}
    for client in clients:
        total = add(sums[client], total)
    return total


def spread_evenly(clients: Sequence[str], most: int) -> tuple[str, ...]:
    """At most so many of the clients, from the first to the last at equal distances."""
    if len(clients) <= most:
        return tuple(clients)
    return tuple(clients[place * len(clients) // most] for place in range(most))


def cross_scores(
    scorer: Scorer,
    model: LoadedModel,
    params_of: Callable[[str], Tree],
    heldout: Mapping[str, Sequence[Record]],
    clients: Sequence[str],
    step: Callable[[int], None] = lambda done: None,
) -> tuple[dict[str, dict[str, Scores]], dict[str, Scores], dict[str, Scores]]:
    """The models of some clients on the test sets of these.

    Returns:
        (by model and test set, each model on the others' test sets, each model on all of them). `step` is told how many
        models are done.
    """
    there = {client: heldout[client] for client in clients}
    matrix: dict[str, dict[str, Scores]] = {}
    others, union = dict[str, Scores](), dict[str, Scores]()
    for done, client in enumerate(clients, 1):
        sums = sums_by_client(scorer, model, params_of(client), there)
        matrix[client] = {who: scorer.figures(found) for who, found in sums.items()}
        others[client] = scorer.figures(added_up(sums, [who for who in clients if who != client]))
        union[client] = scorer.figures(added_up(sums, clients))
        step(done)
    return matrix, others, union
