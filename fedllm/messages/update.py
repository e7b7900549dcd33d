"""Requests, updates and failures: what a client is sent, and what it answers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from fedllm.messages.context import RoundContext
from fedllm.tensors import tree
from fedllm.tensors.base_delta import BaseDelta
from fedllm.tensors.layout import LeafSpec
from fedllm.tensors.tree import Tree
from fedllm.tensors.wire_format import DENSE, WireFormat

FIGURES = frozenset({"metrics", "counts"})  # parts about the work: a few values, outside of every bound
CLEAR = "clear"  # the part that an aggregator which encrypts leaves as it is

Asked = Mapping[str, Mapping[str, LeafSpec]]  # by part, of each tensor its type and shape


def not_known(call: str) -> Asked | None:
    """Nobody has worked out what a reply may hold."""
    return None


@dataclass(frozen=True)
class Request:
    """Server to client: parameters, one extra tree per stage, and the facts of the step.

    base_delta: what the client has missed of what was added to the frozen weights.
    asks: what the reply to a call may hold; for the server's own use, which is not sent.
    """

    params: Tree
    extras: tuple[Tree, ...]
    ctx: RoundContext
    base_delta: BaseDelta = BaseDelta()
    asks: Callable[[str], Asked | None] = field(default=not_known, compare=False, repr=False)


def sent_hash(request: Request) -> bytes:
    """SHA-256 of the parameters and the extras that a request sends, and of the version of the frozen weights."""
    found = hashlib.sha256(str(request.base_delta.version).encode())
    for leaves in (request.params, *request.extras):
        found.update(tree.digest(leaves).encode())
    return found.digest()


@dataclass(frozen=True)
class Part:
    """One named tree of an update.

    weight None: the WEIGH stage decides. w > 0: its own weight. 0: a plain sum, never divided.
    From the WEIGH stage on the tree is weight * values, until its `decode` divides by the sum.
    exact: values that no stage may round; a note for the client's own stages, which is not sent.
    grid: above 0, the values are multiples of it, a power of two, and their norm is bounded: a stage behind may round
    them towards zero, to multiples of it; such a note, too.
    bits: of such a multiple, at most 2^bits; 0: as many as the type's grid has.
    answered: on the server, behind the weigher's `decode`: the sum of the weights over what it was divided by. Below 1
    where the denominator counts clients that were lost. What is no difference from what was sent needs it: the old
    value stands for the rest, 1 - answered.
    """

    tree: Tree
    weight: float | None = None
    wire_format: WireFormat = DENSE
    exact: bool = False
    grid: float = 0.0
    bits: int = 0
    answered: float = 1.0


@dataclass(frozen=True)
class Update:
    """The only thing that a client sends: "delta" (local - global: ascent), "metrics", and what stages add."""

    parts: Mapping[str, Part]

    def having(self, name: str, part: Part) -> Update:
        """This update with one part set."""
        return replace(self, parts={**self.parts, name: part})

    def without(self, *names: str) -> Update:
        """This update with these parts taken out."""
        return replace(self, parts={key: part for key, part in self.parts.items() if key not in names})


@dataclass(frozen=True)
class Failure:
    """A client that did not answer, and why, in one sentence."""

    client: str
    round: int
    reason: str
