"""What the stages of client-level differential privacy have in common.

    client   u_k <- clip(what it sends)            server   sum_k u_k + noise, then a fixed denominator divides

A stage says what one of its releases costs (`release`); what a run has spent is counted from the releases it made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedllm.errors import require
from fedllm.messages.context import ClientContext, RoundContext, ServerContext, ServerNoise
from fedllm.messages.traits import DELTA, SAME_DELTA, Bracket, Fact, Traits
from fedllm.messages.update import Update
from fedllm.privacy.releases import Release
from fedllm.privacy.schemes import Scheme
from fedllm.privacy.settings import BOUND, NOISE, is_bound, is_noise
from fedllm.stages.base import Stage
from fedllm.stages.privacy.clipping import Group, Leaf, clipped, grouped, mapped, on_grid
from fedllm.tensors.tree import Tree

BESIDE = frozenset({"control", "metrics", "counts"})  # parts beside the delta; the last two stay in the clear


class UnprotectedError(RuntimeError):
    """A stage was asked to release a sum without a source of secret noise: a fault of the program, not of a user."""


@dataclass(frozen=True)
class PrivateStage(Stage):
    """Bounds what a client sends.

    Args:
        clip: bound on the 2-norm of all that a client sends in a round.
        noise_multiplier: standard deviation of the noise over the clip. None: from `demands.privacy.target_epsilon`.
        groups: pattern of tensor names to a bound of its own (`{"*lora_A": 0.5}`); `clip` is that of the others. Of G
            groups each is given noise of sqrt(G) times its bound, which costs what one group costs.
    """

    clip: float
    noise_multiplier: float | None = None
    groups: Mapping[str, float] = field(default_factory=dict)

    noised_by: ClassVar[Literal["server", "client"]] = "server"
    traits = Traits(Bracket.PRIVATE, takes=DELTA, may_take=BESIDE, gives=Fact.BOUNDED, keeps=SAME_DELTA)

    def __post_init__(self) -> None:
        for name, bound in [("clip", self.clip), *((f"groups.{own}", bound) for own, bound in self.groups.items())]:
            require(is_bound(bound), self, field=name, value=bound, allowed=BOUND)
        noise = self.noise_multiplier
        require(noise is None or is_noise(noise), self, field="noise_multiplier", value=noise,
                allowed=f"{NOISE}, or null to calibrate it")  # fmt: skip

    def __hash__(self) -> int:
        return hash((type(self), self.clip, self.noise_multiplier, *self.groups.items()))

    def release(self, noise_multiplier: float, scheme: Scheme) -> Release:
        """What one release with this noise is to an accountant."""
        raise NotImplementedError

    def _bounded(self, update: Update, clip: float, local: ClientContext) -> tuple[Update, list[Group]]:
        """The update below its bound; on the grid, unless there is no noise that needs one."""
        groups = grouped(update, clip, self._scaled(clip))
        if not groups:
            return update, []
        private = self.noise_multiplier != 0
        return (on_grid(update, groups, local.ctx.population) if private else clipped(update, groups)), groups

    def _scaled(self, clip: float) -> Mapping[str, float]:
        """The bounds of the groups, which keep their proportion to a clip that adapts."""
        return {pattern: bound * clip / self.clip for pattern, bound in self.groups.items()}

    def _multiplier(self) -> float:
        if self.noise_multiplier is None:
            raise UnprotectedError("noise_multiplier is null, and nobody has calibrated it")
        return self.noise_multiplier


def server_noise(ctx: RoundContext) -> ServerNoise:
    """Where the server's noise comes from.

    Raises:
        UnprotectedError: there is none, so nothing may be released.
    """
    if isinstance(ctx, ServerContext) and ctx.noise is not None:
        return ctx.noise
    raise UnprotectedError("a private sum has no source of secret noise; pass a ServerContext with one")


def is_scores(update: Update) -> bool:
    """Whether an update is an evaluation's, or holds nothing that is bounded."""
    return not update.parts.keys() - {"metrics", "counts"}


def in_type(total: Update, like: Tree, expected: float) -> Update:
    """The noised parts in the types of the parameters, and with a weight also where nobody answered, so that a fixed
    denominator divides them."""

    def cast(leaf: Leaf, value: Tensor) -> Tensor:
        return value.to(like[leaf[1]].dtype if leaf[1] in like else torch.float32)

    parts = {
        name: replace(part, weight=expected) if name == "delta" and not part.weight else part
        for name, part in mapped(total, cast).parts.items()
    }
    return replace(total, parts=parts)


def expected_cohort(ctx: RoundContext) -> float:
    """The expected size of a cohort; where nobody knows it, that of this one."""
    return ctx.expected if isinstance(ctx, ServerContext) else float(ctx.cohort)
