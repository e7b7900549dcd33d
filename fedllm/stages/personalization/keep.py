"""Local leaves: part of the adapter stays with the client and is never sent.

    client k trains (shared leaves from the server, own leaves from its memory) and answers for the shared ones alone

Arivazhagan et al. 2019 (FedPer), arXiv 1912.00818; `Keep(("*lora_B",))` shares lora_A alone, as FedSA-LoRA does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from fedllm.errors import require
from fedllm.messages.context import ClientContext, RoundContext
from fedllm.messages.traits import SAME_DELTA, Bracket, Fact, Traits
from fedllm.messages.update import Update
from fedllm.stages.base import Stage
from fedllm.tensors import tree
from fedllm.tensors.tree import Tree


@dataclass(frozen=True)
class Keep(Stage):
    """Memory: the client's values of its own leaves. Scratch: their values at the start of the round.

    A client starts from `local.fresh` the first time. Stands first, so that no other stage sees the leaves; the
    server's values of them stay as they were. Neutral, to the bit: patterns that no leaf's name fits.

    Args:
        patterns: shell-style patterns of leaf names, such as "*lora_B" or "*.layers.0.*".
    """

    patterns: tuple[str, ...]

    traits = Traits(Bracket.LOCAL, keeps=SAME_DELTA, loses=Fact.ALL_TENSORS | Fact.ANY_RANK)

    def __post_init__(self) -> None:
        listed = not isinstance(self.patterns, str) and len(self.patterns) > 0
        allowed = 'a list of at least one pattern, such as ["*lora_B"]'
        require(listed, self, field="patterns", value=self.patterns, allowed=allowed)

    def personal(self, params: Tree, memory: Tree, state: Tree, client: str) -> Tree:
        """The leaves of these names: as the client remembers them, or as they begin."""
        return {**self._own(params), **memory}

    def broadcast(self, params: Tree, state: Tree, ctx: RoundContext) -> tuple[Tree, Tree]:
        """Send the shared leaves alone."""
        return {name: leaf for name, leaf in params.items() if not tree.matches(name, self.patterns)}, {}

    def receive(self, params: Tree, extra: Tree, memory: Tree, local: ClientContext) -> tuple[Tree, Tree]:
        """Put the client's own leaves in."""
        own = {**self._own(local.initial_params), **memory}
        return {**params, **own}, own

    def encode(self, update: Update, scratch: Tree, memory: Tree, local: ClientContext) -> tuple[Update, Tree]:
        """Take the client's own leaves out of every part, and remember where they are now."""
        delta = update.parts.get("delta")
        moved = {} if delta is None else self._own(delta.tree)
        hidden = scratch.keys() | moved.keys()
        parts = {
            name: replace(part, tree={leaf: value for leaf, value in part.tree.items() if leaf not in hidden})
            for name, part in update.parts.items()
        }
        return Update(parts), {**memory, **{name: scratch[name] + leaf for name, leaf in moved.items()}}

    def _own(self, leaves: Mapping[str, Tensor]) -> Tree:
        return {name: leaf for name, leaf in leaves.items() if tree.matches(name, self.patterns)}
