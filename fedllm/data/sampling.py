"""Sampling: which clients take part in a round.

Each way of sampling carries its scheme: what an accountant of differential privacy may assume about who takes part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedllm.errors import ConfigError
from fedllm.privacy.schemes import EveryRound, FixedSizeScheme, PoissonScheme, RotationScheme, Scheme
from fedllm.rng import Key


class Sampling:
    """A frozen dataclass of settings."""

    def draw(self, clients: Sequence[str], key: Key, round: int = 0) -> Sequence[str]:
        """The cohort of a round, in the clients' own order. `key` is the run's."""
        raise NotImplementedError

    def most(self, clients: int) -> int:
        """The size of the largest cohort that may be drawn from so many clients."""
        return clients

    def expected(self, clients: int) -> float:
        """The expected size of a cohort: a number that does not depend on who was drawn."""
        return float(self.most(clients))

    def scheme(self, clients: int) -> Scheme | None:
        """What an accountant may assume of these draws; None: nothing that it knows."""
        return None


@dataclass(frozen=True)
class All(Sampling):
    """Every client, every round."""

    def draw(self, clients: Sequence[str], key: Key, round: int = 0) -> Sequence[str]:
        """All of them."""
        return list(clients)

    def scheme(self, clients: int) -> Scheme:
        """No client's part is left to chance."""
        return EveryRound()


@dataclass(frozen=True)
class UniformSampling(Sampling):
    """A fixed number of clients, uniformly without replacement."""

    cohort: int

    def __post_init__(self) -> None:
        if self.cohort < 1:
            raise ConfigError(f"federation.shards.sampling.uniform.cohort is {self.cohort}; it must be 1 or more")

    def draw(self, clients: Sequence[str], key: Key, round: int = 0) -> Sequence[str]:
        """`cohort` of them.

        Raises:
            ConfigError: there are fewer clients than that.
        """
        if self.cohort > len(clients):
            raise ConfigError(
                f"federation.shards.sampling.uniform.cohort is {self.cohort}, but there are {len(clients)} clients"
            )
        chosen = torch.randperm(len(clients), generator=key.fold("cohort", round).generator())[: self.cohort]
        return [clients[index] for index in sorted(chosen.tolist())]

    def most(self, clients: int) -> int:
        """`cohort`."""
        return min(self.cohort, clients)

    def scheme(self, clients: int) -> Scheme:
        """A cohort of fixed size."""
        return FixedSizeScheme(clients, self.cohort)


@dataclass(frozen=True)
class PoissonSampling(Sampling):
    """Each client on its own with probability `rate`; a cohort may be empty."""

    rate: float

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise ConfigError(f"federation.shards.sampling.poisson.rate is {self.rate}; it must be in [0, 1]")

    def draw(self, clients: Sequence[str], key: Key, round: int = 0) -> Sequence[str]:
        """A binomial number of them."""
        generator = key.fold("cohort", round).generator()
        taken = torch.rand(len(clients), generator=generator, dtype=torch.float64) < self.rate
        return [client for client, chosen in zip(clients, taken.tolist(), strict=True) if chosen]

    def most(self, clients: int) -> int:
        """All of them, or none at a rate of 0."""
        return clients if self.rate > 0 else 0

    def expected(self, clients: int) -> float:
        """rate x clients."""
        return self.rate * clients

    def scheme(self, clients: int) -> Scheme:
        """An independent coin for each client."""
        return PoissonScheme(self.rate)


@dataclass(frozen=True)
class RotationSampling(Sampling):
    """Cohorts in turn: the clients are shuffled once, and each round takes the next `cohort` of them.

    After b = clients / cohort rounds the order begins again, so that a client takes part in every b-th round and never
    sooner. The cohort must divide the clients. For noise that is correlated over rounds (`dp_ftrl`).
    """

    cohort: int

    def __post_init__(self) -> None:
        if self.cohort < 1:
            raise ConfigError(f"federation.shards.sampling.rotation.cohort is {self.cohort}; it must be 1 or more")

    def draw(self, clients: Sequence[str], key: Key, round: int = 0) -> Sequence[str]:
        """The next `cohort` of them.

        Raises:
            ConfigError: the cohort does not divide the clients, so that some would never take part.
        """
        if len(clients) % self.cohort:
            raise ConfigError(
                f"federation.shards.sampling.rotation.cohort is {self.cohort}, which does not divide the "
                f"{len(clients)} clients: some would never take part"
            )
        order = torch.randperm(len(clients), generator=key.fold("rotation").generator()).tolist()
        begin = round % self.separation(len(clients)) * self.cohort
        return [clients[index] for index in sorted(order[begin : begin + self.cohort])]

    def most(self, clients: int) -> int:
        """`cohort`."""
        return min(self.cohort, clients)

    def separation(self, clients: int) -> int:
        """Rounds from one part of a client to its next."""
        return max(1, clients // self.cohort)

    def scheme(self, clients: int) -> Scheme:
        """At least so many rounds between two of a client."""
        return RotationScheme(self.separation(clients))
