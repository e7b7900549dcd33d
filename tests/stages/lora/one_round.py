"""One round of clients whose factors after training are given, on layers that are not square."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedllm.aggregators.sum import Sum
from fedllm.messages import serialization
from fedllm.messages.context import ClientContext, Profile, RoundContext
from fedllm.messages.traits import Fact
from fedllm.messages.update import Part, Request, Update
from fedllm.rng import Key
from fedllm.stages.base import Stage
from fedllm.stages.round_trip import Received, broadcast_all, decode_all, encode_all
from fedllm.stages.weighting.by_examples import ByExamples
from fedllm.tensors import low_rank, tree
from fedllm.tensors.tree import Tree

LAYERS = {"q": (192, 576), "down": (576, 1536)}  # out, in
RANKS, EXAMPLES = (4, 8, 16), (5, 3, 11)
WEIGHTS = [n / sum(EXAMPLES) for n in EXAMPLES]


def drawn(rank: int, seed: int) -> Tree:
    generator = torch.Generator().manual_seed(seed)
    found: Tree = {}
    for layer, (size_out, size_in) in LAYERS.items():
        b, a = (torch.randn(*shape, generator=generator) / 8 for shape in ((size_out, rank), (rank, size_in)))
        found |= low_rank.layer_leaves(layer, b, a)
    return found


@dataclass(frozen=True)
class Round:
    """Clients' factors, from those of the server to those after training.

    `behind`: stages behind the weigher. `bandwidths`: of the clients; none: they have none.
    `lost`: who does not answer.
    """

    server: Tree
    after: Sequence[Tree]
    stage: Stage
    examples: Sequence[float] = EXAMPLES
    behind: tuple[Stage, ...] = ()
    bandwidths: Sequence[int | None] = ()
    weigher: Stage = ByExamples()
    lost: Sequence[int] = ()

    def pipeline(self) -> tuple[Stage, ...]:
        return (self.stage, self.weigher, *self.behind)

    def sent(self, k: int) -> Update:
        ctx = RoundContext(0, Key(0), len(self.after), len(self.after), client=str(k), slot=k, profile=self.profile(k))
        params, extras = broadcast_all(self.pipeline(), self.server, self.nothing(), ctx)
        request = serialization.deserialize(serialization.serialize(Request(params, extras, ctx)))
        assert isinstance(request, Request)
        scratch = tuple(stage.receive(request.params, {}, {}, ClientContext(ctx))[1] for stage in self.pipeline())
        delta = tree.sub(self.after[k], request.params)
        local = ClientContext(ctx, {"examples": self.examples[k]}, initial_params=self.server)
        arrival = Received(scratch, tuple(frozenset() for _ in scratch))
        update, _ = encode_all(self.pipeline(), Update({"delta": Part(delta)}), arrival, self.nothing(), local)
        return update

    def profile(self, k: int) -> Profile:
        rank = len(next(leaf for name, leaf in self.after[k].items() if name.endswith("lora_A")))
        return Profile(rank=rank, bandwidth=self.bandwidths[k] if self.bandwidths else None)

    def nothing(self) -> tuple[Tree, ...]:
        """No states, no memories."""
        return tuple({} for _ in self.pipeline())

    def result(self) -> Tree:
        """The server's parameters after the round; every message goes over the wire."""
        return tree.add(self.server, self.total().parts["delta"].tree)

    def total(self) -> Update:
        """What the round comes to: the server's step, and what joins the frozen weights if something does."""

        def call(name, requests):
            for k in (k for k in range(len(self.after)) if k not in self.lost):
                yield str(k), serialization.deserialize(serialization.serialize(self.sent(k)))

        total = Sum().reduce(call, {})
        ctx = RoundContext(0, Key(0), len(self.after), len(self.after))
        total, _ = decode_all(self.pipeline(), total, self.server, self.nothing(), ctx)
        moves_base = Fact.WRITABLE_BASE in self.stage.traits.needs
        assert total.parts.keys() - ({"base_delta"} if moves_base else set()) == {"delta"}
        return total


def a_round(stage: Stage) -> Round:
    return Round(drawn(max(RANKS), 0), [drawn(rank, seed) for seed, rank in enumerate(RANKS, 1)], stage)


def product(leaves: Tree, layer: str) -> Tensor:
    b, a = low_rank.pair(leaves, layer)
    return b.double() @ a.double()


def off(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())
