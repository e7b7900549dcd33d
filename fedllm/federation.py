"""The federation: who the clients are, what each holds, who takes part in a round, and who fails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedllm.events import DataReported
from fedllm.rng import Key
from fedllm.update import Profile

Record = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Population:
    """The clients' records, by client: to train on, and held out."""

    train: Mapping[str, Sequence[Record]]
    heldout: Mapping[str, Sequence[Record]]
    report: DataReported = field(default_factory=lambda: DataReported({}, {}))

    @property
    def clients(self) -> tuple[str, ...]:
        """All clients, in a fixed order."""
        return tuple(self.train)


class Federation:
    """A frozen dataclass of settings."""

    def load(self, key: Key) -> Population:
        """Read and partition the data; the same for the same settings and key."""
        raise NotImplementedError

    def sample(self, clients: Sequence[str], round: int, key: Key) -> Sequence[str]:
        """The cohort of a round; may be empty."""
        raise NotImplementedError

    def profile(self, client: str) -> Profile:
        """What a client's device can do."""
        return Profile()

    def failure(self, client: str, round: int, call: str, key: Key) -> str | None:
        """The reason why a client is lost in a call, for simulations of failing clients."""
        return None
