"""Distributed differential privacy: each client adds a little noise to integers, and a secure sum shows them together.

    q_k = round(u_k min(1, (C - sqrt(d) s / 2) / ||u_k||) / s) + Sk(mu)        mu = (z C / s)^2 / h
    s (sum_k q_k)        has noise of standard deviation z C or more, as long as h clients of the sum are honest

s: the grid's step, a power of two of at most C / `levels`. The bound is taken in before the rounding, so that it holds
exactly behind it: none of the noise is spent on the rounding. Nobody has to be trusted with the noise, and it is that
of one server, not the sqrt(m) times as much of m clients which each hide by themselves. Agarwal, Kairouz and Liu 2021,
the Skellam mechanism, arXiv 2110.04995.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch

from fedllm.errors import ClientError, require
from fedllm.messages.context import ClientContext, RoundContext
from fedllm.messages.update import FIGURES, Update
from fedllm.privacy.releases import LEAST_LEVELS, Release
from fedllm.privacy.schemes import EveryRound, Scheme
from fedllm.privacy.skellam import skellam
from fedllm.stages.privacy.base import PrivateStage, UnprotectedError, expected_cohort, in_type, is_scores
from fedllm.stages.privacy.clipping import Group, Lattice, clipped, digest, grouped, placed, rounded_within
from fedllm.tensors.tree import Tree

REACH = 12  # standard deviations: no draw of a run is farther out
MOST_LEVELS = 2**40


@dataclass(frozen=True)
class DiscreteNoise(PrivateStage):
    """Skellam noise on the clients, for secure sums. Neutral, to the bit: a large clip and `noise_multiplier: 0`.

    Who takes part is known to the server, so sampling amplifies nothing. `noise_multiplier` is the noise's standard
    deviation in a sum over the clip, if `survivors` clients have added it; with more of them there is more noise.

    Args:
        survivors: h, clients of each sum that are sure to be there and to be honest.
        levels: steps of the grid from 0 to the clip, at least. Rounding takes about sqrt(d) / (2 levels) of the bound.
    """

    survivors: int = 2
    levels: int = 2**14

    noised_by: ClassVar[Literal["server", "client"]] = "client"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.survivors >= 1, self, field="survivors", value=self.survivors, allowed="1 or more")
        good = LEAST_LEVELS <= self.levels <= MOST_LEVELS
        require(good, self, field="levels", value=self.levels, allowed=f"{LEAST_LEVELS} to 2^40")

    __hash__ = PrivateStage.__hash__

    def release(self, noise_multiplier: float, scheme: Scheme) -> Release:
        """One sum that a client is in."""
        return Release("skellam", noise_multiplier, EveryRound(), levels=self.levels)

    def encode(self, update: Update, scratch: Tree, memory: Tree, local: ClientContext) -> tuple[Update, Tree]:
        """Bound what is sent, round it, and add this client's part of the noise.

        Raises:
            ClientError: the grid is too coarse for so many values.
        """
        if is_scores(update):
            return update, memory
        groups = grouped(update, self.clip, self._scaled(self.clip))
        if self.noise_multiplier == 0 or not groups:
            return clipped(update, groups), memory
        if local.noise is None:
            raise UnprotectedError("discrete_noise has no source of secret noise")
        step = 2.0 ** math.floor(math.log2(min(group.clip for group in groups) / self.levels))
        self._fits(groups, step)
        rounded = rounded_within(update, groups, dict.fromkeys(groups, step), torch.float64)
        sums = [Lattice(group, step, _integers(rounded, group, step)) for group in groups]
        purpose = f"discrete_noise/{self._multiplier()!r}/{self.survivors}"
        stream, bits = local.noise.stream(purpose, digest(lattice.values for lattice in sums)), 0
        for lattice in sums:
            levels = lattice.group.clip / step
            spread = self._multiplier() * math.sqrt(len(groups)) * levels / math.sqrt(self.survivors)
            noised = lattice.values + skellam(stream, spread**2, lattice.group.size)
            rounded = placed(rounded, lattice.group, noised * step)
            bits = max(bits, math.ceil(math.log2(levels + REACH * spread + 1)))
        parts = {n: p if n in FIGURES else replace(p, grid=step, bits=bits) for n, p in rounded.parts.items()}
        return replace(rounded, parts=parts), memory

    def _fits(self, groups: list[Group], step: float) -> None:
        """
        Raises:
            ClientError: rounding would take half of a bound or more.
        """
        for group in groups:
            if math.sqrt(group.size) * step > group.clip:
                least = math.ceil(math.sqrt(group.size))
                raise ClientError(
                    f"discrete_noise.levels is {self.levels}, too few for {group.size} values; set it to {least} or "
                    f"more (to {8 * least}, rounding takes a sixteenth of the bound)"
                )

    def decode(self, total: Update, params: Tree, state: Tree, ctx: RoundContext) -> tuple[Update, Tree]:
        """The sum as it is, with a weight also where nobody answered."""
        return (total if is_scores(total) else in_type(total, params, expected_cohort(ctx))), state


def _integers(update: Update, group: Group, step: float) -> np.ndarray:
    """(d,) int64 numbers of steps."""
    flat = torch.cat([update.parts[part].tree[name].reshape(-1) for part, name in group.leaves])
    found: np.ndarray = torch.round(flat / step).to(torch.int64).numpy()
    return found
