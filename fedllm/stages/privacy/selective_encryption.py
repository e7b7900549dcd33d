"""Selective encryption: the most sensitive entries of an update travel encrypted, others in the clear or not at all.

    first round     all is encrypted, and so is |u_k|        S = sum_k |u_k|, which the server is shown
    later           the share p of entries with the largest S is encrypted

Jin et al. 2023 (FedML-HE), arXiv 2303.10837: there the sensitivity of a weight is how far its gradient moves when a
label does; here it is how far clients move it, which a client has at hand after its local steps. A map of sums tells as
much as the first round's update does. What travels in the clear can be attacked like any update: measure it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedllm.errors import RoundVoid, require
from fedllm.messages.context import ClientContext, RoundContext
from fedllm.messages.traits import DELTA, NONE, Bracket, Fact, Traits
from fedllm.messages.update import CLEAR, Part, Update
from fedllm.stages.base import Stage
from fedllm.tensors.tree import Tree
from fedllm.tensors.wire_format import DENSE

SENSITIVITY = "sensitivity"


@dataclass(frozen=True)
class SelectiveEncryption(Stage):
    """Which entries of the delta the aggregator homomorphic_sum encrypts. Neutral, to the bit: share 1.

    With `rest: drop` it may stand before any aggregator: it then sends the same entries in all rounds but the first.

    State: which entries are encrypted, from the end of the first round on. Other parts are encrypted as a whole.

    Args:
        share: p, of all entries of the delta. rest: the others travel in the clear, or are dropped.
    """

    share: float = 0.1
    rest: Literal["clear", "drop"] = "clear"
    sizes_follow_values: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(0 < self.share <= 1, self, field="share", value=self.share, allowed="above 0 and at most 1")
        require(self.rest in ("clear", "drop"), self, field="rest", value=self.rest, allowed="clear or drop")

    @property
    def traits(self) -> Traits:
        """The server may read what is in the clear."""
        seen = Fact.HIDDEN if self.rest == "clear" and self.share < 1 else NONE
        lost = seen | Fact.ANY_RANK | Fact.SHAPE
        made = frozenset({SENSITIVITY, *([CLEAR] if self.rest == "clear" else [])})
        return Traits(Bracket.WIRE, takes=DELTA, makes=made, loses=lost)

    def broadcast(self, params: Tree, state: Tree, ctx: RoundContext) -> tuple[Tree, Tree]:
        """The map."""
        return params, state

    def receive(self, params: Tree, extra: Tree, memory: Tree, local: ClientContext) -> tuple[Tree, Tree]:
        """Remember it."""
        return params, extra

    def encode(self, update: Update, scratch: Tree, memory: Tree, local: ClientContext) -> tuple[Update, Tree]:
        """The delta in two parts; in the first round, whole and with its magnitudes."""
        delta = update.parts.get("delta")
        if delta is None:
            return update, memory
        if not scratch:
            sizes = {name: leaf.abs() for name, leaf in delta.tree.items()}
            return update.having(SENSITIVITY, Part(sizes, 0.0)), memory
        chosen = {name: scratch[name].bool() for name in delta.tree}
        secret = {name: leaf[chosen[name]] for name, leaf in delta.tree.items()}
        sent = update.having("delta", replace(delta, tree=secret, wire_format=DENSE))
        if self.rest == "clear":
            sent = sent.having(CLEAR, Part({name: leaf[~chosen[name]] for name, leaf in delta.tree.items()}, 0.0))
        return sent, memory

    def decode(self, total: Update, params: Tree, state: Tree, ctx: RoundContext) -> tuple[Update, Tree]:
        """The delta in one part again; the map after the first round.

        Raises:
            RoundVoid: the parts are not those of the map.
        """
        if SENSITIVITY in total.parts:
            return total.without(SENSITIVITY), self._map(total.parts[SENSITIVITY].tree)
        delta = total.parts.get("delta")
        if not state or delta is None or not any(leaf.shape != state[n].shape for n, leaf in delta.tree.items()):
            return total, state  # an empty round
        clear = total.parts[CLEAR].tree if CLEAR in total.parts else {}
        leaves = {name: _joined(name, state, leaf, clear.get(name)) for name, leaf in delta.tree.items()}
        return total.without(CLEAR).having("delta", replace(delta, tree=leaves)), state

    def _map(self, sizes: Tree) -> Tree:
        """(shape of the leaf) uint8: 1 for the entries with the largest sums; of equal ones the first by name."""
        names = sorted(sizes)
        flat = torch.cat([sizes[name].reshape(-1).double() for name in names])
        order = torch.sort(flat, descending=True, stable=True).indices
        chosen = torch.zeros(flat.shape, dtype=torch.uint8)
        chosen[order[: max(1, round(self.share * flat.numel()))]] = 1
        pieces = torch.split(chosen, [sizes[name].numel() for name in names])
        return {name: piece.reshape(sizes[name].shape) for name, piece in zip(names, pieces, strict=True)}


def _joined(name: str, state: Tree, secret: Tensor, clear: Tensor | None) -> Tensor:
    """One leaf, from its entries."""
    chosen = state[name].bool()
    found = torch.zeros(chosen.shape, dtype=secret.dtype)
    rest = int((~chosen).sum())
    if secret.shape != (chosen.numel() - rest,) or (clear is not None and clear.shape != (rest,)):
        raise RoundVoid(f"what was added up has other entries of {name} than the map")
    found[chosen] = secret
    if clear is not None:
        found[~chosen] = clear.to(secret.dtype)
    return found
