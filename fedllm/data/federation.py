"""The federation: who the clients are, what each holds, who takes part in a round, and who fails."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain
from typing import overload

from fedllm.errors import DataError, Record, nearest
from fedllm.events import DataReported
from fedllm.messages.context import Profile
from fedllm.privacy.schemes import Scheme
from fedllm.rng import Key


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

    def of(self, client: str) -> Population:
        """One client alone.

        Raises:
            DataError: there is no such client.
        """
        if client not in self.train:
            raise DataError(f"there is no client '{client}' in this federation{nearest(client, self.clients)}")
        return replace(self, train={client: self.train[client]}, heldout={client: self.heldout.get(client, ())})


class ConcatRecords(Sequence[Record]):
    """Several sequences as one, end to end; nothing is copied."""

    def __init__(self, parts: Iterable[Sequence[Record]]) -> None:
        self._parts = [part for part in parts if len(part)]
        self._ends = list(accumulate(map(len, self._parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        place = range(len(self))[index]
        part = bisect_right(self._ends, place)
        return self._parts[part][place - self._ends[part]]

    def __iter__(self) -> Iterator[Record]:
        return chain.from_iterable(self._parts)


class Federation:
    """A frozen dataclass of settings."""

    def load(self, key: Key) -> Population:
        """Read and partition the data; the same for the same settings and key."""
        raise NotImplementedError

    def files(self) -> Sequence[str]:
        """The files that the data is read from, as the settings name them."""
        return ()

    def sample(self, clients: Sequence[str], round: int, key: Key) -> Sequence[str]:
        """The cohort of a round; may be empty. `key` is the run's."""
        raise NotImplementedError

    def expected_cohort(self, clients: int) -> float:
        """The expected size of a cohort; it does not depend on who is drawn."""
        return float(self.largest_cohort(clients))

    def scheme(self, clients: int) -> Scheme | None:
        """What an accountant of differential privacy may assume of who takes part; None: nothing that it knows."""
        return None

    def largest_cohort(self, clients: int) -> int:
        """How many of so many clients a round asks at most."""
        return clients

    def profile(self, client: str) -> Profile:
        """What a client's device can do."""
        return Profile()

    def failure(self, client: str, round: int, call: str, key: Key) -> str | None:
        """The reason why a client is lost in a call, for simulations of failing clients."""
        return None
