"""A stage: what happens to parameters and updates on their round trip, client half and server half in one class.

    server   broadcast  in order         decode   reverse order
    client   receive    reverse order    grads    in order, each local step    encode   in order

Each hook is the identity by default. A stage is a frozen dataclass whose fields are its settings;
its state (server), memory (client, kept between rounds) and scratch (client, dies with the round)
go in and come out as trees.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import ClassVar

from fedllm.messages.context import ClientContext, RoundContext
from fedllm.messages.update import Update
from fedllm.tensors.tree import Tree


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

    def trains_in_round(self, name: str, round: int) -> bool:
        """Whether a leaf that the scope trains does so in this round."""
        return True

    def broadcast(self, params: Tree, state: Tree, ctx: RoundContext) -> tuple[Tree, Tree]:
        """Server, down: (parameters to send, extra for this stage's `receive`)."""
        return params, {}

    def receive(self, params: Tree, extra: Tree, memory: Tree, local: ClientContext) -> tuple[Tree, Tree]:
        """Client, down: (parameters to start from, scratch)."""
        return params, {}

    def grads(self, grads: Tree, params: Tree, scratch: Tree) -> Tree:
        """Client, each local step, before the optimiser."""
        return grads

    def encode(self, update: Update, scratch: Tree, memory: Tree, local: ClientContext) -> tuple[Update, Tree]:
        """Client, up: (update, memory for its next round). Parts that are not there are passed on."""
        return update, memory

    def decode(self, total: Update, params: Tree, state: Tree, ctx: RoundContext) -> tuple[Update, Tree]:
        """Server, after the sum: (update, state). Creates its state at first use."""
        return total, state
