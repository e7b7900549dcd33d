"""A toy secure sum: every pair of clients adds and subtracts one mask, so the masks are gone from the sum.

    keys     a client draws a secret a and sends G^a mod P
    peers    it is told what the others sent; with client j it shares the seed G^(a_i a_j)
    work     its integers + sum over j of (+1 if i < j, else -1) * mask(seed_ij), modulo 2^64
    unmask   for clients that were lost since, those who answered tell the seeds that they share with them

It shows that the interfaces carry such a protocol. It protects nothing: P is small, and a lost client's masks are laid
open by whoever answers, with no threshold.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedllm.aggregators.base import Aggregator, ClientSession, Handler
from fedllm.aggregators.sum import Sum
from fedllm.errors import ClientError
from fedllm.messages.call import Call, Replies
from fedllm.messages.context import ClientContext, RoundContext
from fedllm.messages.traits import Bracket, Fact, Traits
from fedllm.messages.update import Part, Request, Update
from fedllm.rng import Key
from fedllm.stages.base import Stage
from fedllm.tensors import tree
from fedllm.tensors.tree import Tree

P, G = 2**61 - 1, 37  # a Mersenne prime; its generator


@dataclass(frozen=True)
class Rounding(Stage):
    """Fixed point: x is sent as the integer round(x 2^bits). Moves an entry by at most 2^-(bits + 1)."""

    bits: int = 20

    traits = Traits(Bracket.WIRE, gives=Fact.INTEGERS, keeps=Fact.BOUNDED)

    def encode(self, update: Update, scratch: Tree, memory: Tree, local: ClientContext) -> tuple[Update, Tree]:
        """To int64."""
        parts = {name: Part(self._rounded(part.tree), part.weight) for name, part in update.parts.items()}
        return Update(parts), memory

    def decode(self, total: Update, params: Tree, state: Tree, ctx: RoundContext) -> tuple[Update, Tree]:
        """Back to the parameters' types, or to float64."""
        parts = {
            name: replace(part, tree={leaf: self._restored(leaf, value, params) for leaf, value in part.tree.items()})
            for name, part in total.parts.items()
        }
        return Update(parts), state

    def _rounded(self, leaves: Tree) -> Tree:
        return {name: torch.round(leaf.double() * 2**self.bits).to(torch.int64) for name, leaf in leaves.items()}

    def _restored(self, name: str, leaf: Tensor, params: Tree) -> Tensor:
        if leaf.dtype != torch.int64:
            return leaf
        exact: Tensor = leaf.double() / 2**self.bits
        return exact.to(params[name].dtype) if name in params else exact


@dataclass(frozen=True)
class Masked(Aggregator):
    """The secure sum. `unmask` False leaves the masks of lost clients in: the negative control."""

    unmask: bool = True

    traits = Traits(needs=Fact.INTEGERS)

    def handlers(self) -> Mapping[str, Handler]:
        """The client's side of the calls around the work."""
        return {"keys": _keys, "peers": _peers, "unmask": _unmask}

    def seal(self, update: Update, session: ClientSession) -> Update:
        """Hide the integers of every part."""
        client, seeds = str(session.ctx.client), session.notes["seeds"]
        parts = {}
        for name, part in update.parts.items():
            sealed = tree.map_leaves(torch.Tensor.clone, part.tree)
            for peer, seed in seeds.items():
                _add_mask(sealed, _sign(client, peer), Key(seed).fold(name))
            parts[name] = replace(part, tree=sealed)
        return Update(parts)

    def reduce(self, call: Call, requests: Mapping[str, Request], name: str = "work") -> Update:
        """Four calls; the third is the one that is asked for."""
        public = {client: reply.parts["key"].tree["public"] for client, reply in _asked(call, "keys", requests, {})}
        told = [client for client, _ in _asked(call, "peers", _only(requests, public), public)]
        noted = Noted(call)
        total = Sum().reduce(noted, _only(requests, told), name)
        lost = {client: torch.tensor(0) for client in public if client not in noted.answered}
        if not lost or not noted.answered or not self.unmask:
            return total
        for client, reply in _asked(call, "unmask", _only(requests, noted.answered), lost):
            noted.answered.remove(client)
            for peer, seed in reply.parts["seeds"].tree.items():
                for part_name, part in total.parts.items():
                    _add_mask(part.tree, -_sign(client, peer), Key(int(seed)).fold(part_name))
        if noted.answered:
            raise ClientError(f"client {noted.answered[0]} did not unmask; a real protocol has shares for that")
        return total


@dataclass
class Noted:
    """A call that notes who answered."""

    call: Call
    answered: list[str] = field(default_factory=list)

    def __call__(self, name: str, requests: Mapping[str, Request]) -> Replies:
        """The replies, unchanged."""
        for client, reply in self.call(name, requests):
            if isinstance(reply, Update):
                self.answered.append(client)
            yield client, reply


def _asked(call: Call, name: str, requests: Mapping[str, Request], params: Tree) -> list[tuple[str, Update]]:
    """The answers to a further call, which sends `params` and no extras."""
    asked = {client: Request(params, (), request.ctx) for client, request in requests.items()}
    return [(client, reply) for client, reply in call(name, asked) if isinstance(reply, Update)]


def _only(requests: Mapping[str, Request], clients: Iterable[str]) -> dict[str, Request]:
    return {client: requests[client] for client in clients}


def _keys(request: Request, session: ClientSession) -> Update:
    session.notes["secret"] = 1 + secrets.randbelow(P - 1)
    public = torch.tensor(pow(G, session.notes["secret"], P))
    return Update({"key": Part({"public": public}, 0.0)})


def _peers(request: Request, session: ClientSession) -> Update:
    session.notes["seeds"] = {
        peer: pow(int(public), session.notes["secret"], P)
        for peer, public in request.params.items()
        if peer != session.ctx.client
    }
    return Update({})


def _unmask(request: Request, session: ClientSession) -> Update:
    seeds = {peer: torch.tensor(session.notes["seeds"][peer]) for peer in request.params}
    return Update({"seeds": Part(seeds, 0.0)})


def _sign(client: str, peer: str) -> int:
    return 1 if client < peer else -1


def _add_mask(leaves: Tree, sign: int, key: Key) -> None:
    """leaves += sign * mask, in place and modulo 2^64."""
    for name, leaf in leaves.items():
        mask = torch.empty(leaf.shape, dtype=torch.int64).random_(-(2**63), None, generator=key.fold(name).generator())
        leaf.add_(mask, alpha=sign)
