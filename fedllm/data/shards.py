"""Shards: one data set, spread over simulated clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path

import torch

from fedllm.data.federation import Federation, Population
from fedllm.data.heldout import hold_out
from fedllm.data.lazy_records import open_records, view
from fedllm.data.partition import Partition, partition, report
from fedllm.data.partitioners.base import Partitioner
from fedllm.data.partitioners.by import By
from fedllm.data.partitioners.iid import Iid
from fedllm.data.record_schema import Record
from fedllm.data.sampling import All, Sampling
from fedllm.errors import ConfigError, DataError, nearest
from fedllm.events import DataReported
from fedllm.messages.context import Profile
from fedllm.privacy.schemes import Scheme
from fedllm.rng import Key

ALIKE = Profile()
Held = dict[str, Sequence[Record]]


@dataclass(frozen=True)
class ClientOutage:
    """A client that is lost in a round (from 0), in its call `work` or `evaluate`.

    An evaluation's round is the number of rounds that are complete.
    """

    client: str
    round: int
    call: str = "work"


@dataclass(frozen=True)
class Shards(Federation):
    """A data set and how it is spread.

    Args:
        data: packaged name, file (.jsonl, .jsonl.gz, .csv, .parquet), or hub id.
        clients: how many; null: as many as the partition finds.
        fields: canonical name to source field (`{prompt: instruction}`), or to a format (`"{instruction} {input}"`).
        heldout: another source, partitioned by the same natural key, or a fraction of each client's records.
        label: the field that the partition report counts; null: the one that the partition looks at.
        failure_rate, failures: clients that are lost, for simulations.
        profiles: shell-style pattern over the clients' names to what is different there
            (`{"cargo*": {rank: 4, steps: 2}}`). Of several that fit a client the longest counts.
        devices: class of devices to what is different there (`{phone: {rank: 4, bandwidth: 100000}}`); holds for what a
            profile of that `device` leaves open. The class `default` is that of all others.
    """

    data: str
    clients: int | None = None
    partition: Partitioner = Iid()
    sampling: Sampling = All()
    fields: Mapping[str, str] = field(default_factory=dict)
    heldout: str | float = 0.1
    label: str | None = None
    failure_rate: float = 0.0
    failures: tuple[ClientOutage, ...] = ()
    profiles: Mapping[str, Profile] = field(default_factory=dict)
    devices: Mapping[str, Profile] = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash((self.data, self.clients, self.partition, self.sampling, self.heldout))

    def __post_init__(self) -> None:
        if self.clients is not None and self.clients < 1:
            raise ConfigError(f"federation.shards.clients is {self.clients}; it must be 1 or more")
        if not isinstance(self.heldout, str) and not 0 <= self.heldout < 1:
            raise ConfigError(f"federation.shards.heldout is {self.heldout}; a fraction must be in [0, 1)")
        if not 0 <= self.failure_rate <= 1:
            raise ConfigError(f"federation.shards.failure_rate is {self.failure_rate}; it must be in [0, 1]")
        self._check_devices()

    def load(self, key: Key) -> Population:
        """Read, partition, hold out; once per process, as long as the files stay as they are.

        Raises:
            FedllmError: the data cannot be had or partitioned, or a setting does not fit the clients.
        """
        population = _load(self, key, (_stamp(self.data), _stamp(self.heldout)))
        self.sample(population.clients, 0, key)
        for loss in self.failures:
            if loss.client not in population.train:
                known = nearest(loss.client, population.clients)
                raise ConfigError(f"federation.shards.failures: there is no client '{loss.client}'{known}")
        self._check_profiles(population.clients)
        return population

    def files(self) -> Sequence[str]:
        """Of `data` and `heldout`, those that are files; not packaged data or the hub's."""
        return tuple(str(source) for source in (self.data, self.heldout) if _stamp(source) is not None)

    def sample(self, clients: Sequence[str], round: int, key: Key) -> Sequence[str]:
        """By `sampling`."""
        return self.sampling.draw(clients, key, round)

    def largest_cohort(self, clients: int) -> int:
        """By `sampling`."""
        return self.sampling.most(clients)

    def expected_cohort(self, clients: int) -> float:
        """By `sampling`."""
        return self.sampling.expected(clients)

    def scheme(self, clients: int) -> Scheme | None:
        """By `sampling`."""
        return self.sampling.scheme(clients)

    def failure(self, client: str, round: int, call: str, key: Key) -> str | None:
        """By `failures` and `failure_rate`."""
        if ClientOutage(client, round, call) in self.failures:
            return "federation.shards.failures asks for it"
        generator = key.fold(round, client, "failure").generator()
        if call == "work" and float(torch.rand((), generator=generator)) < self.failure_rate:
            return "federation.shards.failure_rate asks for it"
        return None

    def profile(self, client: str) -> Profile:
        """By `profiles`, and by `devices` what these leave open; all other devices are alike."""
        fitting = self._fitting(client)
        own = self.profiles[fitting[0]] if fitting else ALIKE
        return own.over(self.devices.get(own.device, ALIKE))

    def _fitting(self, client: str) -> list[str]:
        """The patterns that fit a client, the longest first."""
        return sorted((pattern for pattern in self.profiles if fnmatchcase(client, pattern)), key=len, reverse=True)

    def _check_devices(self) -> None:
        """Each device is of a class that `devices` has, if it has any."""
        known = {*self.devices, ALIKE.device}
        for pattern, profile in self.profiles.items() if self.devices else ():
            if profile.device not in known:
                where = f"federation.shards.profiles.{pattern}.device"
                raise ConfigError(f"{where}: unknown device '{profile.device}'{nearest(profile.device, self.devices)}")
        for name, profile in self.devices.items():
            if profile.device not in (ALIKE.device, name):
                raise ConfigError(
                    f"federation.shards.devices.{name}.device: a class is of no other class; leave it out"
                )

    def _check_profiles(self, clients: Sequence[str]) -> None:
        """Each pattern fits a client, and none has two that say different things with the same right."""
        where, used = "federation.shards.profiles", set[str]()
        for client in clients if self.profiles else ():
            fitting = self._fitting(client)
            used.update(fitting)
            if len(fitting) > 1 and len(fitting[0]) == len(fitting[1]):
                one, two = sorted(fitting[:2])
                raise ConfigError(f"{where}: '{one}' and '{two}' both fit client '{client}'; name it in full")
        for pattern in self.profiles:
            if pattern not in used:
                raise ConfigError(f"{where}: '{pattern}' fits no client{nearest(pattern, clients)}")


@lru_cache(maxsize=4)
def _load(shards: Shards, key: Key, stamps: tuple[object, ...]) -> Population:
    records = open_records(shards.data, fields=shards.fields)
    parts = partition(records, shards.partition, clients=shards.clients, key=key.fold("partition"))
    train, heldout = _sides(shards, records, parts, key)
    _, labels, divergence = report(records, parts, shards.label or shards.partition.field)
    return Population(
        train=train,
        heldout=heldout,
        report=DataReported(
            train={client: len(rows) for client, rows in train.items()},
            heldout={client: len(rows) for client, rows in heldout.items()},
            labels=labels,
            divergence=divergence,
            left_out=parts.left_out,
        ),
    )


def _stamp(source: str | float) -> object:
    """When a file was written, and its size, so that a changed one is read again."""
    path = Path(str(source)).expanduser()
    if not path.is_file():
        return None
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def _sides(shards: Shards, records: Sequence[Record], parts: Partition, key: Key) -> tuple[Held, Held]:
    """Records by client, to train on and held out; with a fraction the latter are taken out of the former."""
    if isinstance(shards.heldout, str):
        train: Held = {client: view(records, rows) for client, rows in parts.clients.items()}
        return train, _other(shards, shards.heldout, train, key)
    kept: Held = {}
    out: Held = {}
    for client, rows in parts.clients.items():
        sides = hold_out(rows, fraction=shards.heldout, key=key.fold("heldout", client))
        kept[client], out[client] = view(records, sides[0]), view(records, sides[1])
    return kept, out


def _other(shards: Shards, source: str, train: Held, key: Key) -> Held:
    """The clients' shares of another source: all of it, or by the same natural key."""
    records = open_records(source, fields=shards.fields)
    if not isinstance(shards.partition, By):
        return dict.fromkeys(train, records)
    parts = partition(records, shards.partition, clients=None, key=key.fold("partition"))
    strangers = parts.clients.keys() - train.keys()
    if strangers:
        raise DataError(f"{source} holds records of {sorted(strangers)[0]}, who is no client of {shards.data}")
    return {client: view(records, parts.clients.get(client, ())) for client in train}
