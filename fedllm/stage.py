"""A stage: what happens to parameters and updates on their round trip, client half and server half in one class.

    server   broadcast  in order         decode   reverse order
    client   receive    reverse order    grads    in order, each local step    encode   in order

Each hook is the identity by default. A stage is a frozen dataclass whose fields are its settings;
its state (server), memory (client, kept between rounds) and scratch (client, dies with the round)
go in and come out as trees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import ClassVar

from fedllm.tree import Tree
from fedllm.update import Ctx, Local, Update


class Bracket(IntEnum):
    """Where a stage may stand. A list of stages is sorted by bracket; order inside one is part of the method."""

    MEANING = 0
    WEIGH = 1
    PRIVATE = 2
    ADVERSARY = 3
    WIRE = 4


class Norm(Enum):
    """What a stage's encode does to the norm of the parts that it is given.

    FREE promises nothing; GROWS grows by a declared rounding and no more.
    """

    BOUNDS = "bounds"
    KEEPS = "keeps"
    GROWS = "grows"
    FREE = "free"


@dataclass(frozen=True)
class Stage:
    """Five hooks, each the identity. Override what the method needs; never override another stage."""

    bracket: ClassVar[Bracket] = Bracket.MEANING
    takes: ClassVar[frozenset[str]] = frozenset()  # parts that encode reads
    makes: ClassVar[frozenset[str]] = frozenset()  # parts that encode adds and decode removes
    norm: ClassVar[Norm] = Norm.FREE
    elementwise: ClassVar[bool] = False  # may run on a whole stack at once
    integers: ClassVar[bool] = False  # encode yields integers
    reshapes: ClassVar[bool] = False  # the delta no longer has the shape of the parameters
    unequal: ClassVar[bool] = False  # brings updates of clients of unequal ranks to one shape
    both_factors: ClassVar[bool] = False  # works on lora_A and lora_B of a layer together
    rebases: ClassVar[bool] = False  # after its decode an entry of the parameters stands for something else than before
    needs_basis: ClassVar[bool] = False  # right only while an entry of the parameters stands for the same in all rounds
    shows_each: ClassVar[bool] = False  # a sum of its parts still shows every client's own
    shrinks: ClassVar[bool] = False  # a client may be left with smaller leaves than it is sent, from round to round
    caps: ClassVar[bool] = False  # fits what is sent to the bandwidth of the client's profile
    own_weights: ClassVar[bool] = False  # weighs the delta of each client itself
    shifts: ClassVar[bool] = False  # decode makes the part "shift": factors whose product joins the frozen weights
    steers: ClassVar[bool] = False  # decode turns the mean of the updates into another step
    of_adapter: ClassVar[str | None] = None  # the one adapter that it works on
    keeps_delta: ClassVar[bool] = False  # encode leaves the values of the delta as they are
    needs_delta: ClassVar[bool] = False  # decode is right only for the mean of the deltas that its own encode saw
    needs_equal: ClassVar[bool] = False  # right only if every client weighs the same
    equal: ClassVar[bool] = False  # of a weigher: every client weighs the same
    first: ClassVar[bool] = False  # must stand before every other stage

    @property
    def fixed_denominator(self) -> bool:
        """Of a weigher: it divides by a number that does not depend on who answered."""
        return False

    @property
    def over_answered(self) -> bool:
        """Its decode divides by the weights of those who answered, whatever the weigher has divided by."""
        return False

    @property
    def absolute(self) -> bool:
        """What it sends are the values that a client came to, not how far it moved."""
        return False

    @property
    def optimizers(self) -> frozenset[str] | None:
        """Local optimisers that the method's derivation covers; None: any."""
        return None

    def moves(self, name: str, round: int) -> bool:
        """Whether a leaf that the scope trains does so in this round."""
        return True

    def broadcast(self, params: Tree, state: Tree, ctx: Ctx) -> tuple[Tree, Tree]:
        """Server, down: (parameters to send, extra for this stage's `receive`)."""
        return params, {}

    def receive(self, params: Tree, extra: Tree, memory: Tree, local: Local) -> tuple[Tree, Tree]:
        """Client, down: (parameters to start from, scratch)."""
        return params, {}

    def grads(self, grads: Tree, params: Tree, scratch: Tree) -> Tree:
        """Client, each local step, before the optimiser."""
        return grads

    def encode(self, update: Update, scratch: Tree, memory: Tree, local: Local) -> tuple[Update, Tree]:
        """Client, up: (update, memory for its next round). Parts that are not there are passed on."""
        return update, memory

    def decode(self, total: Update, params: Tree, state: Tree, ctx: Ctx) -> tuple[Update, Tree]:
        """Server, after the sum: (update, state). Creates its state at first use."""
        return total, state


@dataclass(frozen=True)
class Arrival:
    """What `receive` left behind, per stage: the scratch, and the names that the stage saw."""

    scratch: tuple[Tree, ...]
    names: tuple[frozenset[str], ...]


def down(stages: Sequence[Stage], params: Tree, states: Sequence[Tree], ctx: Ctx) -> tuple[Tree, tuple[Tree, ...]]:
    """Fold of `broadcast`, in order: what a client is sent."""
    extras = []
    for stage, state in zip(stages, states, strict=True):
        params, extra = stage.broadcast(params, state, ctx)
        extras.append(extra)
    return params, tuple(extras)


def arrive(
    stages: Sequence[Stage], params: Tree, extras: Sequence[Tree], memories: Sequence[Tree], local: Local
) -> tuple[Tree, Arrival]:
    """Fold of `receive`, in reverse order: where a client starts."""
    scratch: list[Tree] = []
    names: list[frozenset[str]] = []
    for stage, extra, memory in reversed(list(zip(stages, extras, memories, strict=True))):
        params, kept = stage.receive(params, extra, memory, local)
        scratch.append(kept)
        names.append(frozenset(params))
    return params, Arrival(tuple(reversed(scratch)), tuple(reversed(names)))


def hooked(stages: Sequence[Stage]) -> bool:
    """True if a stage changes gradients."""
    return any(type(stage).grads is not Stage.grads for stage in stages)


def adjust(stages: Sequence[Stage], arrival: Arrival, grads: Tree, params: Tree) -> Tree:
    """Fold of `grads`, in order. A stage sees the leaves that passed through its `receive`, no others."""
    for stage, scratch, names in zip(stages, arrival.scratch, arrival.names, strict=True):
        if type(stage).grads is not Stage.grads:
            seen = {name: grad for name, grad in grads.items() if name in names}
            around = {name: leaf for name, leaf in params.items() if name in names}
            grads = {**grads, **stage.grads(seen, around, scratch)}
    return grads


def up(
    stages: Sequence[Stage], update: Update, arrival: Arrival, memories: Sequence[Tree], local: Local
) -> tuple[Update, tuple[Tree, ...]]:
    """Fold of `encode`, in order: what a client sends, and its memories for the next round."""
    kept = []
    for stage, scratch, memory in zip(stages, arrival.scratch, memories, strict=True):
        update, memory = stage.encode(update, scratch, memory, local)
        kept.append(memory)
    return update, tuple(kept)


def merge(
    stages: Sequence[Stage], total: Update, params: Tree, states: Sequence[Tree], ctx: Ctx
) -> tuple[Update, tuple[Tree, ...]]:
    """Fold of `decode`, in reverse order: the sum becomes the step of the server."""
    kept: list[Tree] = []
    for stage, state in reversed(list(zip(stages, states, strict=True))):
        total, state = stage.decode(total, params, state, ctx)
        kept.append(state)
    return total, tuple(reversed(kept))
