"""Local differential privacy: each client clips what it sends and adds noise itself, so that nobody else is trusted.

    u_k <- u_k min(1, C / ||u_k||) + N(0, (z C)^2 I)

Any two updates below the bound are at most 2 C apart, so each message is a Gaussian release against replacement. The
noise of m clients in their mean is sqrt(m) times that of a server which adds it once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from fedllm.messages.context import ClientContext, RoundContext
from fedllm.messages.update import Update
from fedllm.privacy.releases import Release
from fedllm.privacy.schemes import EveryRound, Scheme
from fedllm.stages.privacy.base import PrivateStage, UnprotectedError, expected_cohort, in_type, is_scores
from fedllm.stages.privacy.clipping import Lattice, digest
from fedllm.tensors.tree import Tree


@dataclass(frozen=True)
class LocalGaussian(PrivateStage):
    """The server sees noised updates alone; who takes part is known to it, so sampling amplifies nothing.

    Neutral, to the bit: a large clip and `noise_multiplier: 0`.
    """

    noised_by: ClassVar[Literal["server", "client"]] = "client"

    __hash__ = PrivateStage.__hash__

    def release(self, noise_multiplier: float, scheme: Scheme) -> Release:
        """One message of one client."""
        return Release("local", noise_multiplier, EveryRound())

    def encode(self, update: Update, scratch: Tree, memory: Tree, local: ClientContext) -> tuple[Update, Tree]:
        """Bound what is sent, and add the noise."""
        if is_scores(update):
            return update, memory
        sent, groups = self._bounded(update, self.clip, local)
        if self.noise_multiplier == 0 or not groups:
            return sent, memory
        sums = [Lattice.of(sent, group, local.ctx.population) for group in groups]
        if local.noise is None:
            raise UnprotectedError("local_gaussian has no source of secret noise")
        purpose = f"local_gaussian/{self._multiplier()!r}"  # the same draws at another scale would show the update
        stream = local.noise.stream(purpose, digest(lattice.values for lattice in sums))
        for lattice in sums:
            sent = lattice.noised(sent, self._multiplier() * math.sqrt(len(groups)), stream)
        return in_type(sent, {}, 1.0), memory

    def decode(self, total: Update, params: Tree, state: Tree, ctx: RoundContext) -> tuple[Update, Tree]:
        """The sum as it is, with a weight also where nobody answered."""
        return (total if is_scores(total) else in_type(total, params, expected_cohort(ctx))), state
