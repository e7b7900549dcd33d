"""A stage: what happens to parameters and updates on their round trip, client half and server half in one class.

    server   broadcast  in order         decode   reverse order
    client   receive    reverse order    grads    in order, each local step    encode   in order

Each hook is the identity by default. A stage is a frozen dataclass whose fields are its settings;
its state (server), memory (client, kept between rounds) and scratch (client, dies with the round)
go in and come out as trees.

Methods are in the folders beside this file. What may stand beside what, and in which order, is declared by `traits` and
refused in `experiment/checks/check.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedllm.messages.context import ClientContext, RoundContext
from fedllm.messages.traits import Traits
from fedllm.messages.update import Update
from fedllm.tensors.tree import Tree


@dataclass(frozen=True)
class Stage:
    """Five hooks, each the identity. Override what the method needs; never override another stage.

    `personal` is no hook of the round trip: it says what a client has of its own where a run is read.
    `sizes_follow_values`: how large what it sends is depends on values of a request, so that nobody knows it before.
    """

    sizes_follow_values: ClassVar[bool] = False

    @property
    def traits(self) -> Traits:
        """What it declares, for `check`. A subclass sets `traits`, or overrides this where a setting decides."""
        return Traits()

    def trains_in_round(self, name: str, round: int, rounds: int) -> bool:
        """Whether a leaf that the scope trains does so in this round of so many."""
        return True

    def personal(self, params: Tree, memory: Tree, state: Tree, client: str) -> Tree:
        """What a client's own model has in place of the server's `params`, for what is made of a finished run: its
        files, evaluation on all clients, chat, export, `fedllm personalise`. {}: all clients have one model.

        Args:
            params: complete, at their initial values where the server has none. memory: the client's, of this stage; {}
                of a newcomer, which is given what it would begin with. state: the stage's, on the server.
        """
        return {}

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
