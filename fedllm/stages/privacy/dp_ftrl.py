"""DP-FTRL: noise that is correlated over the rounds, so that most of it cancels in what the model adds up.

    y_t = sum_{j < p} c_j x_{t-j} + Z_t        x'_t = (y_t - sum_{0 < j < p} c_j x'_{t-j}) / c_0

x_t: the sum of the clipped updates of round t; x'_t: what leaves the server; Z_t: independent Gaussian noise. The
coefficients are the first p of the square root of the matrix of prefix sums, c_j = binom(2j, j) / 4^j. The whole run is
one Gaussian release of the vectors y, whose sensitivity follows from how often, and how far apart, one client takes
part. No assumption on sampling is needed; the sampler keeps the distance (`rotation`).

Kairouz et al. 2021, arXiv 2103.00039; Fichtenberger et al. 2022, arXiv 2202.11205; the band: Kalinin and Lampert 2024,
arXiv 2405.13763, theorem 2. The coefficients are rounded to integers over 2^10, so that y is a vector of integers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from fedllm.errors import require
from fedllm.messages.context import ClientContext, RoundContext
from fedllm.messages.traits import Fact
from fedllm.messages.update import Update
from fedllm.privacy import toeplitz
from fedllm.privacy.noise import Floats, Ints
from fedllm.privacy.releases import Release
from fedllm.privacy.schemes import RotationScheme, Scheme
from fedllm.stages.privacy.base import PrivateStage, expected_cohort, in_type, is_scores, server_noise
from fedllm.stages.privacy.clipping import Lattice, digest, grouped, lengths, placed
from fedllm.tensors.tree import Tree

SCALE = 2**10


@dataclass(frozen=True)
class DpFtrl(PrivateStage):
    """Client-level central differential privacy without amplification by sampling.

    State, secret like the noise itself: the sums and the releases of the last p - 1 rounds. Neutral, to the bit: a
    large clip and `noise_multiplier: 0`. An entry of a tensor must stand for the same in all rounds.

    Args:
        separation: at least so many rounds between two parts of one client; the sampler must keep it.
        band: p, how many rounds the noise is correlated over; null: `separation`.
    """

    separation: int = 1
    band: int | None = None

    traits = replace(PrivateStage.traits, needs=Fact.FIXED_BASIS | Fact.SAME_TENSORS | Fact.SERVER_STATE)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.separation >= 1, self, field="separation", value=self.separation, allowed="1 or more")
        band = self.band
        require(band is None or band >= 1, self, field="band", value=band, allowed="1 or more, or null")

    def __hash__(self) -> int:
        return hash((PrivateStage.__hash__(self), self.separation, self.band))

    def coefficients(self, rounds: int) -> Ints:
        """(rounds,) int64: c times 2^10, zeros behind the band."""
        band = self.band or toeplitz.default_band(rounds, self.separation)
        return np.round(SCALE * toeplitz.banded_square_root(rounds, band)).astype(np.int64)

    def sensitivity(self, rounds: int) -> float:
        """How far one client that sends unit vectors can move y, over the whole run."""
        most = math.ceil(rounds / self.separation)
        return toeplitz.sensitivity(self.coefficients(rounds) / SCALE, most, self.separation)

    def release(self, noise_multiplier: float, scheme: Scheme) -> Release:
        """The whole run."""
        return Release("correlated", noise_multiplier, RotationScheme(self.separation))

    def encode(self, update: Update, scratch: Tree, memory: Tree, local: ClientContext) -> tuple[Update, Tree]:
        """Bound what is sent."""
        return (update if is_scores(update) else self._bounded(update, self.clip, local)[0]), memory

    def decode(self, total: Update, params: Tree, state: Tree, ctx: RoundContext) -> tuple[Update, Tree]:
        """From the sum of the round to what leaves the server."""
        if is_scores(total):
            return total, state
        if self.noise_multiplier != 0:
            total, state = self._released(total, state, ctx)
        return in_type(total, params, expected_cohort(ctx)), state

    def _released(self, total: Update, state: Tree, ctx: RoundContext) -> tuple[Update, Tree]:
        groups, weights = grouped(total, self.clip, self.groups), self.coefficients(ctx.rounds)
        sums, spread = [Lattice.of(total, group, ctx.population) for group in groups], math.sqrt(len(groups))
        mixed = [self._mixed(state, place, lattice.values, weights) for place, lattice in enumerate(sums)]
        source = server_noise(ctx)
        stream = source.release("dp_ftrl", "correlated", self._multiplier(), digest(mixed))
        std = self._multiplier() * self.sensitivity(ctx.rounds) * SCALE * spread
        after = dict[str, torch.Tensor]()
        for place, (lattice, found) in enumerate(zip(sums, mixed, strict=True)):
            noise = stream.discrete_gaussian(std * lattice.group.clip / lattice.step, lattice.group.size)
            estimate = self._solved(state, place, (found + noise).astype(np.float64), weights)
            total = placed(total, lattice.group, estimate * lattice.step)
            after |= self._remembered(state, place, lattice.values, estimate)
        source.measured(*lengths(total, groups, std / SCALE), self.clip)
        return total, after

    def _mixed(self, state: Tree, place: int, newest: Ints, weights: Ints) -> Ints:
        """sum_j c_j x_{t-j} in integers."""
        found: Ints = weights[0] * newest
        for back in self._backs(state, place):
            found = found + weights[back] * state[f"sum{back}/{place}"].numpy()
        return found

    def _solved(self, state: Tree, place: int, released: Floats, weights: Ints) -> Floats:
        """What leaves the server, from y and from what has left it before."""
        for back in self._backs(state, place):
            released = released - weights[back] * state[f"estimate{back}/{place}"].numpy()
        solved: Floats = released / weights[0]
        return solved

    def _remembered(self, state: Tree, place: int, newest: Ints, estimate: Floats) -> Tree:
        """The last p - 1 rounds, the newest first."""
        kept = {f"sum1/{place}": torch.from_numpy(newest.copy()), f"estimate1/{place}": torch.from_numpy(estimate)}
        for back in self._backs(state, place):
            if back + 1 < (self.band or self.separation):
                kept |= {f"{what}{back + 1}/{place}": state[f"{what}{back}/{place}"] for what in ("sum", "estimate")}
        return kept if (self.band or self.separation) > 1 else {}

    def _backs(self, state: Tree, place: int) -> list[int]:
        return [back for back in range(1, self.band or self.separation) if f"sum{back}/{place}" in state]
