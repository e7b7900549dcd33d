"""Moments of the server's steps: the algebra that the server optimisers share.

A moment is a tree in the shapes of the delta. A leaf that a round's delta lacks keeps its moments; a leaf that is
seen for the first time starts from the initial value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedllm.errors import require
from fedllm.messages.context import RoundContext
from fedllm.messages.traits import OWN_STEP, PER_ENTRY, Fact, Traits
from fedllm.messages.update import Update
from fedllm.stages.base import Stage
from fedllm.tensors import tree
from fedllm.tensors.tree import Tree

Rule = Callable[[Tree, Tree], tuple[Tree, Tree]]  # (delta, state) -> (step, state)
Second = Callable[[Tensor, Tensor], Tensor]  # (v, delta squared) -> v
TRAITS = Traits(needs=PER_ENTRY | Fact.SERVER_STATE, loses=OWN_STEP)


def apply_rule(total: Update, state: Tree, rule: Rule) -> tuple[Update, Tree]:
    """The total with its mean delta replaced by the rule's step. Without a delta: both as they are."""
    part = total.parts.get("delta")
    if part is None:
        return total, state
    step, state = rule(part.tree, state)
    return total.having("delta", replace(part, tree=step)), state


def init_moment(moment: Mapping[str, Tensor], delta: Tree, value: float = 0.0) -> Tree:
    """The moment's leaves for `delta`, filled with `value` where there are none yet."""
    return {name: moment[name] if name in moment else torch.full_like(leaf, value) for name, leaf in delta.items()}


def ema(old: Tree, new: Tree, beta: float) -> Tree:
    """beta * old + (1 - beta) * new. A beta of 0 gives the values of `new`."""
    return {name: torch.add(old[name] * beta, leaf, alpha=1 - beta) for name, leaf in new.items()}


def adaptive(
    total: Update, state: Tree, second: Second, *, beta1: float, tau: float, server_lr: float
) -> tuple[Update, Tree]:
    """The server step of Reddi et al. 2021 (arXiv 2003.00295), algorithm 2; `second` is all that its rules differ in.

        m <- beta1 m + (1 - beta1) Δ        v <- second(v, Δ²)        step = server_lr m / (sqrt(v) + tau)

    m starts at 0 and v at tau²; there is no bias correction.
    """

    def rule(delta: Tree, state: Tree) -> tuple[Tree, Tree]:
        m = ema(init_moment(tree.select_prefix(state, "m"), delta), delta, beta1)
        v = {
            name: second(old, delta[name] * delta[name])
            for name, old in init_moment(tree.select_prefix(state, "v"), delta, tau * tau).items()
        }
        step = {name: server_lr * m[name] / (v[name].sqrt() + tau) for name in delta}
        return step, {**state, **tree.add_prefix(m=m, v=v)}

    return apply_rule(total, state, rule)


@dataclass(frozen=True)
class Adaptive(Stage):
    """What FedAdam and FedYogi share: `adaptive` with a `beta2` in its second moment. Not a stage by itself."""

    beta1: float
    beta2: float
    tau: float
    server_lr: float

    traits = TRAITS

    def __post_init__(self) -> None:
        check_adaptive(self, beta1=self.beta1, tau=self.tau, server_lr=self.server_lr)
        require(0 <= self.beta2 <= 1, self, field="beta2", value=self.beta2, allowed="at least 0 and at most 1")

    def decode(self, total: Update, params: Tree, state: Tree, ctx: RoundContext) -> tuple[Update, Tree]:
        """The mean delta becomes the step."""
        return adaptive(total, state, self.second, beta1=self.beta1, tau=self.tau, server_lr=self.server_lr)

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        """The next v, from the old one and the squared delta."""
        raise NotImplementedError


def check_adaptive(owner: object, *, beta1: float, tau: float, server_lr: float) -> None:
    """The ranges of the settings of `adaptive`."""
    require(0 <= beta1 < 1, owner, field="beta1", value=beta1, allowed="at least 0 and below 1")
    require(0 < tau < math.inf, owner, field="tau", value=tau, allowed="above 0 and finite")
    check_server_lr(owner, server_lr)


def check_server_lr(owner: object, server_lr: float) -> None:
    """The range of a server learning rate."""
    require(0 < server_lr < math.inf, owner, field="server_lr", value=server_lr, allowed="above 0 and finite")
