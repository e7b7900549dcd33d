"""Sampling: which clients take part in a round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedllm.errors import ConfigError
from fedllm.rng import Key


class Sampling:
    """A frozen dataclass of settings."""

    def draw(self, clients: Sequence[str], key: Key) -> Sequence[str]:
        """The cohort, in the clients' own order. `key` is the round's."""
        raise NotImplementedError

    def most(self, clients: int) -> int:
        """The size of the largest cohort that may be drawn from so many clients."""
        return clients


@dataclass(frozen=True)
class All(Sampling):
    """Every client, every round."""

    def draw(self, clients: Sequence[str], key: Key) -> Sequence[str]:
        """All of them."""
        return list(clients)


@dataclass(frozen=True)
class UniformSampling(Sampling):
    """A fixed number of clients, uniformly without replacement."""

    cohort: int

    def __post_init__(self) -> None:
        if self.cohort < 1:
            raise ConfigError(f"federation.shards.sampling.uniform.cohort is {self.cohort}; it must be 1 or more")

    def draw(self, clients: Sequence[str], key: Key) -> Sequence[str]:
        """`cohort` of them.

        Raises:
            ConfigError: there are fewer clients than that.
        """
        if self.cohort > len(clients):
            raise ConfigError(
                f"federation.shards.sampling.uniform.cohort is {self.cohort}, but there are {len(clients)} clients"
            )
        chosen = torch.randperm(len(clients), generator=key.generator())[: self.cohort]
        return [clients[index] for index in sorted(chosen.tolist())]

    def most(self, clients: int) -> int:
        """`cohort`."""
        return min(self.cohort, clients)


@dataclass(frozen=True)
class PoissonSampling(Sampling):
    """Each client on its own with probability `rate`; a cohort may be empty."""

    rate: float

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise ConfigError(f"federation.shards.sampling.poisson.rate is {self.rate}; it must be in [0, 1]")

    def draw(self, clients: Sequence[str], key: Key) -> Sequence[str]:
        """A binomial number of them."""
        taken = torch.rand(len(clients), generator=key.generator(), dtype=torch.float64) < self.rate
        return [client for client, chosen in zip(clients, taken.tolist(), strict=True) if chosen]

    def most(self, clients: int) -> int:
        """All of them, or none at a rate of 0."""
        return clients if self.rate > 0 else 0
