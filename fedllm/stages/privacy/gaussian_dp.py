"""DP-FedAvg: what each client sends is clipped, and the server adds Gaussian noise to the sum.

    u_k <- u_k min(1, C / ||u_k||)        Δ = (sum_k u_k + N(0, (z C)^2 I)) / m        m: a fixed number

Without noise nobody's part is hidden; with it the sum is (ε, δ)-differentially private for each client, and all that
follows from it. McMahan et al. 2018, algorithm 1, arXiv 1710.06963. The clip that adapts: Andrew et al. 2021,
algorithm 1, arXiv 1905.03871:

    b_k = 1[||u_k|| <= C] - 1/2        b = (sum_k b_k + N(0, s^2)) / m + 1/2        C <- C exp(-lr (b - quantile))
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedllm.errors import require
from fedllm.messages.context import ClientContext, RoundContext
from fedllm.messages.traits import Traits
from fedllm.messages.update import Part, Update
from fedllm.privacy.calibration import update_noise
from fedllm.privacy.releases import Release
from fedllm.privacy.schemes import Scheme
from fedllm.privacy.settings import LARGEST, MOST, SMALLEST
from fedllm.stages.privacy.base import PrivateStage, expected_cohort, in_type, is_scores, server_noise
from fedllm.stages.privacy.clipping import Group, Lattice, digest, grouped, lengths, norm
from fedllm.tensors.tree import Tree


@dataclass(frozen=True)
class AdaptiveClip:
    """A clip that follows a quantile of the clients' norms.

    Args:
        quantile: share of the clients that are not cut. lr: how fast the clip follows.
        count_noise: standard deviation of the noise on the number of clients that are not cut, in clients. The noise on
            the updates grows so that both together cost what `noise_multiplier` says; must be above half of it.
        floor: the clip never falls below this share of the first one.
    """

    count_noise: float
    quantile: float = 0.5
    lr: float = 0.2
    floor: float = 1e-4

    def __post_init__(self) -> None:
        for name, most in (("count_noise", MOST), ("lr", 10.0), ("floor", 1.0)):
            value = self.__dict__[name]
            require(0 < value <= most, self, field=name, value=value, allowed=f"above 0 and at most {most:g}")
        require(0 < self.quantile < 1, self, field="quantile", value=self.quantile, allowed="between 0 and 1")


@dataclass(frozen=True)
class GaussianDp(PrivateStage):
    """Client-level central differential privacy. Neutral, to the bit: a large clip and `noise_multiplier: 0`.

    State: the clip, where it adapts. What the clip cuts off is lost: no error memory or control term has it.

    Args:
        adaptive: let the clip adapt; `clip` is then the first one.
    """

    adaptive: AdaptiveClip | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adaptive is not None and self.noise_multiplier:
            least, given = self.noise_multiplier / 2, self.adaptive.count_noise
            allowed = f"above {least:g}, half of noise_multiplier; twice that is a good choice"
            require(given > least, self, field="adaptive.count_noise", value=given, allowed=allowed)

    __hash__ = PrivateStage.__hash__

    @property
    def traits(self) -> Traits:  # type: ignore[override]
        """With a clip that adapts, also the part that counts who was cut."""
        own = PrivateStage.traits
        return replace(own, makes=frozenset({"uncut"})) if self.adaptive else own

    def release(self, noise_multiplier: float, scheme: Scheme) -> Release:
        """One noised sum of a cohort."""
        return Release("gaussian", noise_multiplier, scheme)

    def broadcast(self, params: Tree, state: Tree, ctx: RoundContext) -> tuple[Tree, Tree]:
        """The clip of the round, where it adapts."""
        return params, {"clip": self._clip_of(state)} if self.adaptive else {}

    def receive(self, params: Tree, extra: Tree, memory: Tree, local: ClientContext) -> tuple[Tree, Tree]:
        """Remember the clip."""
        return params, extra

    def encode(self, update: Update, scratch: Tree, memory: Tree, local: ClientContext) -> tuple[Update, Tree]:
        """Bound what is sent; say whether it was below the bound."""
        if is_scores(update):
            return update, memory
        clip = float(scratch["clip"]) if self.adaptive else self.clip
        sent, groups = self._bounded(update, clip, local)
        if self.adaptive:
            uncut = all(norm(update, group.leaves) <= group.clip for group in groups)
            sent = sent.having("uncut", Part({"half": torch.tensor(0.5 if uncut else -0.5)}, 0.0, exact=True))
        return sent, memory

    def decode(self, total: Update, params: Tree, state: Tree, ctx: RoundContext) -> tuple[Update, Tree]:
        """Add the noise to the sum; move the clip."""
        if is_scores(total):
            return total, state
        clip = float(self._clip_of(state))
        bits = 2 * float(total.parts["uncut"].tree["half"]) if "uncut" in total.parts else 0.0
        total = total.without("uncut")
        groups = grouped(total, clip, self._scaled(clip))
        if self.noise_multiplier != 0:
            total, bits = self._released(total, groups, clip, round(bits), ctx)
        total = in_type(total, params, expected_cohort(ctx))
        return total, {**state, "clip": self._moved(clip, bits / 2, ctx)} if self.adaptive else state

    def _released(
        self, total: Update, groups: Sequence[Group], clip: float, bits: int, ctx: RoundContext
    ) -> tuple[Update, float]:
        """The noised sum, and the noised sum of the clients' bits (+1 below the clip, -1 above)."""
        z, sums = self._multiplier(), [Lattice.of(total, group, ctx.population) for group in groups]
        found = digest([*(lattice.values for lattice in sums), np.array([bits])])
        source = server_noise(ctx)
        stream = source.release("gaussian_dp", "gaussian", z, found)
        spread = (update_noise(z, self.adaptive.count_noise) if self.adaptive else z) * math.sqrt(len(groups))
        for lattice in sums:
            total = lattice.noised(total, spread, stream)
        source.measured(*lengths(total, groups, spread), clip)
        if self.adaptive is None:
            return total, 0.0
        return total, float(bits + stream.discrete_gaussian(2 * self.adaptive.count_noise, 1)[0])

    def _clip_of(self, state: Tree) -> Tensor:
        return state.get("clip", torch.tensor(self.clip, dtype=torch.float64))

    def _moved(self, clip: float, above_half: float, ctx: RoundContext) -> Tensor:
        """The next clip, from how many more clients than half of the expected cohort were not cut."""
        assert self.adaptive is not None
        share = min(1.0, max(0.0, above_half / expected_cohort(ctx) + 0.5))
        moved = clip * math.exp(-self.adaptive.lr * (share - self.adaptive.quantile))
        least = max(SMALLEST, self.clip * self.adaptive.floor)
        return torch.tensor(min(max(moved, least), LARGEST), dtype=torch.float64)
