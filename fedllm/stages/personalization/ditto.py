"""Ditto: a personal model beside the shared one, pulled towards what the client was sent.

    v <- v - lr (grad F_k(v) + lam (v - w^t))        w^t: the shared branch as it was received, fixed for the round

v trains first and alone, then the shared branch w_k from w^t on the same batches; v never leaves the client and goes on
from round to round. Li et al. 2021, arXiv:2012.04221, algorithm 1. With LoRA v and w are two branches of one adapter,
and the pull is on their factors; with AdamW it passes through the optimiser, as FedProx's does. Ditto's algebra is that
of SGD.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedllm.errors import require
from fedllm.messages.context import ClientContext
from fedllm.messages.traits import Bracket, Fact, Traits
from fedllm.stages.base import Stage
from fedllm.stages.personalization.branch_names import twin
from fedllm.tensors.tree import Tree


@dataclass(frozen=True)
class Ditto(Stage):
    """Scratch: w^t, under the names of the personal branch. No setting makes it FedAvg; `lam: 0`
    is local training beside it, to the bit.

    Stands before `keep`, which holds the personal branch.

    Args:
        lam: strength of the pull, at least 0. own, shared: the two branches.
    """

    lam: float = 1.0
    own: str = "personal"
    shared: str = "shared"

    traits = Traits(Bracket.LOCAL, needs=Fact.GRADIENTS, adapter="multi_lora")

    def __post_init__(self) -> None:
        require(0 <= self.lam < math.inf, self, field="lam", value=self.lam, allowed="at least 0 and finite")

    def receive(self, params: Tree, extra: Tree, memory: Tree, local: ClientContext) -> tuple[Tree, Tree]:
        """Remember what the shared branch was sent as."""
        names = [*params, *local.initial_params]
        return params, {own: params[name] for own, name in twin(names, self.own, self.shared) if name in params}

    def grads(self, grads: Tree, params: Tree, scratch: Tree) -> Tree:
        """Add the pull to the gradients of the personal branch."""
        if self.lam == 0:
            return grads
        pulled = {
            name: grad + self.lam * (params[name] - scratch[name]) for name, grad in grads.items() if name in scratch
        }
        return {**grads, **pulled}
