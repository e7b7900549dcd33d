"""A federation small enough to solve by hand: clients with f_k(w) = 1/2 sum a_k (w - b_k)², leaf by leaf.

`federate` runs any list of stages through the five folds and a plain sum. It knows nothing about a method, so a
textbook loop beside it is an independent second opinion. One local step of rate lr maps w - b_k to
(1 - lr a_k)(w - b_k); `steps` of them contract by rho_k = (1 - lr a_k)^steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from fedllm.aggregators.sum import Sum
from fedllm.messages.context import ClientContext, RoundContext
from fedllm.messages.update import Part, Request, Update
from fedllm.rng import Key
from fedllm.stages.base import Stage
from fedllm.stages.round_trip import adjust_grads, broadcast_all, decode_all, encode_all, receive_all
from fedllm.tensors import tree
from fedllm.tensors.tree import Tree

KEY = Key(7)
SHAPES = {"layer.lora_A": (1, 6), "layer.lora_B": (3, 1)}  # not square: a transposed leaf fails


def leaves(*values: float, dtype: torch.dtype = torch.float64) -> Tree:
    """A tree in SHAPES: 9 values, or one for all."""
    flat = torch.tensor(values * (9 if len(values) == 1 else 1), dtype=dtype)
    return {name: piece.reshape(SHAPES[name]).clone() for name, piece in zip(SHAPES, flat.split([6, 3]), strict=True)}


@dataclass(frozen=True)
class Quadratic:
    """f(w) = 1/2 sum a (w - b)², a client with `examples` examples."""

    a: Tree
    b: Tree
    examples: int = 1

    def grad(self, params: Tree) -> Tree:
        return {name: self.a[name] * (params[name] - self.b[name]) for name in params}


CLIENTS = (
    Quadratic(leaves(1, 2, 1, 3, 1, 2, 1, 2, 4), leaves(1, -2, 3, 4, 5, -6, 1, 2, 3), examples=30),
    Quadratic(leaves(4, 1, 2, 1, 2, 1, 3, 1, 1), leaves(-3, 2, 1, 0, -1, 2, 5, -2, 1), examples=10),
)


@dataclass
class Course:
    """Where a run stands: the server's parameters and states, and each client's memories."""

    params: Tree
    states: Sequence[Tree]
    memories: list[Sequence[Tree]]
    sent: list[Update] = field(default_factory=list)  # copies, in the order of sending

    @classmethod
    def start(cls, stages: Sequence[Stage], clients: int, params: Tree) -> Course:
        empty: Sequence[Tree] = [{} for _ in stages]
        return cls(params, empty, [empty for _ in range(clients)])


def answer(
    stages: Sequence[Stage],
    client: Quadratic,
    request: Request,
    memories: Sequence[Tree],
    *,
    lrs: Sequence[float],
    fresh: Tree,
) -> tuple[Update, Sequence[Tree]]:
    """One client's round: receive, gradient steps of rates `lrs`, encode."""
    local = ClientContext(request.ctx, initial_params=fresh)
    start, arrival = receive_all(stages, request.params, request.extras, memories, local)
    start = {**fresh, **start}
    params = dict(start)
    for lr in lrs:
        params = tree.add(params, adjust_grads(stages, arrival, client.grad(params), params), -lr)
    facts = {"examples": float(client.examples), "steps": len(lrs), "lr_sum": sum(lrs), "tokens": 0}
    update = Update({"delta": Part(tree.sub(params, start)), "metrics": Part({"loss": torch.tensor(1.0)})})
    return encode_all(stages, update, arrival, memories, replace(local, facts=facts))


def one_round(
    stages: Sequence[Stage],
    course: Course,
    index: int,
    *,
    clients: Sequence[Quadratic] = CLIENTS,
    cohort: Sequence[int] | None = None,
    lrs: Sequence[float] = (0.1,) * 5,
    fresh: Tree | None = None,
) -> None:
    """One round of a cohort (all clients unless named), in place."""
    drawn = range(len(clients)) if cohort is None else cohort
    ctx = RoundContext(round=index, key=KEY, cohort=len(drawn), population=len(clients))
    requests = {}
    for slot, k in enumerate(drawn):
        told = replace(ctx, client=str(k), slot=slot)
        requests[str(k)] = Request(*broadcast_all(stages, course.params, course.states, told), told)

    def call(name: str, requests: Mapping[str, Request]):
        for client, request in requests.items():
            k = int(client)
            update, course.memories[k] = answer(
                stages, clients[k], request, course.memories[k], lrs=lrs, fresh=fresh or course.params
            )
            course.sent.append(_copied(update))
            yield client, update

    total = Sum().reduce(call, requests)
    if not total.parts:
        total = Update({"delta": Part(tree.zeros_like(course.params), 0.0)})
    total, course.states = decode_all(stages, total, course.params, course.states, ctx)
    course.params = tree.add(course.params, total.parts["delta"].tree)


def federate(
    stages: Sequence[Stage],
    rounds: int,
    *,
    clients: Sequence[Quadratic] = CLIENTS,
    cohorts: Callable[[int], Sequence[int] | None] = lambda index: None,
    lrs: Sequence[float] = (0.1,) * 5,
    params: Tree | None = None,
) -> Course:
    """Run `rounds` rounds from zeros, or from `params`."""
    start = leaves(0.0) if params is None else params
    course = Course.start(stages, len(clients), start)
    for index in range(rounds):
        one_round(stages, course, index, clients=clients, cohort=cohorts(index), lrs=lrs, fresh=start)
    return course


def optimum(clients: Sequence[Quadratic] = CLIENTS, weights: Sequence[float] | None = None) -> Tree:
    """The minimum of sum_k p_k f_k: sum p_k a_k b_k / sum p_k a_k, entry by entry."""
    p = [1.0] * len(clients) if weights is None else weights
    return {
        name: sum(w * c.a[name] * c.b[name] for w, c in zip(p, clients, strict=True))
        / sum(w * c.a[name] for w, c in zip(p, clients, strict=True))
        for name in clients[0].a
    }


def distance(left: Tree, right: Tree) -> float:
    """The 2-norm of the difference."""
    return tree.norm(tree.sub(left, right))


def _copied(update: Update) -> Update:
    return Update({name: replace(p, tree=tree.map_leaves(torch.clone, p.tree)) for name, p in update.parts.items()})
