"""Shards: one data set, spread over simulated clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from fedllm.errors import ConfigError, DataError, nearest
from fedllm.events import DataReported
from fedllm.federation import Federation, Population
from fedllm.federations.heldout import hold_out
from fedllm.federations.partition import partition, report
from fedllm.federations.records import read_records
from fedllm.federations.sampling import All, Sampling
from fedllm.federations.split import Split
from fedllm.federations.splits.by import By
from fedllm.federations.splits.iid import Iid
from fedllm.rng import Key
from fedllm.update import Profile


@dataclass(frozen=True)
class Loss:
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
        clients: how many; null: as many as the split finds.
        fields: canonical name to source field (`{prompt: instruction}`), or to a format (`"{instruction} {input}"`).
        heldout: another source, split by the same natural key, or a fraction of each client's records.
        label: the field that the partition report counts; null: the split's own.
        failure_rate, failures: clients that are lost, for simulations.
    """

    data: str
    clients: int | None = None
    split: Split = Iid()
    sampling: Sampling = All()
    fields: Mapping[str, str] = field(default_factory=dict)
    heldout: str | float = 0.1
    label: str | None = None
    failure_rate: float = 0.0
    failures: tuple[Loss, ...] = ()

    def __hash__(self) -> int:
        return hash((self.data, self.clients, self.split, self.sampling, self.heldout))

    def __post_init__(self) -> None:
        if self.clients is not None and self.clients < 1:
            raise ConfigError(f"federation.shards.clients is {self.clients}; it must be 1 or more")
        if not isinstance(self.heldout, str) and not 0 <= self.heldout < 1:
            raise ConfigError(f"federation.shards.heldout is {self.heldout}; a fraction must be in [0, 1)")
        if not 0 <= self.failure_rate <= 1:
            raise ConfigError(f"federation.shards.failure_rate is {self.failure_rate}; it must be in [0, 1]")

    def load(self, key: Key) -> Population:
        """Read, split, hold out; once per process, as long as the files stay as they are.

        Raises:
            FedllmError: the data cannot be had or split, or `sampling` or `failures` do not fit the clients.
        """
        population = _load(self, key, (_stamp(self.data), _stamp(self.heldout)))
        self.sampling.draw(population.clients, key)
        for loss in self.failures:
            if loss.client not in population.train:
                known = nearest(loss.client, population.clients)
                raise ConfigError(f"federation.shards.failures: there is no client '{loss.client}'{known}")
        return population

    def sample(self, clients: Sequence[str], round: int, key: Key) -> Sequence[str]:
        """By `sampling`."""
        return self.sampling.draw(clients, key)

    def failure(self, client: str, round: int, call: str, key: Key) -> str | None:
        """By `failures` and `failure_rate`."""
        if Loss(client, round, call) in self.failures:
            return "federation.shards.failures asks for it"
        generator = key.fold(round, client, "failure").generator()
        if call == "work" and float(torch.rand((), generator=generator)) < self.failure_rate:
            return "federation.shards.failure_rate asks for it"
        return None

    def profile(self, client: str) -> Profile:
        """All devices are alike."""
        return Profile()


@lru_cache(maxsize=4)
def _load(shards: Shards, key: Key, stamps: tuple[object, ...]) -> Population:
    records = read_records(shards.data, fields=shards.fields)
    parts = partition(records, shards.split, clients=shards.clients, key=key.fold("partition"))
    train: dict[str, list[dict[str, Any]]] = {c: [records[i] for i in rows] for c, rows in parts.clients.items()}
    heldout = _heldout(shards, train, key)
    label = shards.label or shards.split.field
    _, labels, divergence = report(records, parts, label)
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


def _heldout(shards: Shards, train: dict[str, list[dict[str, Any]]], key: Key) -> dict[str, list[dict[str, Any]]]:
    """Held-out records by client; with a fraction they are taken out of `train`."""
    if not isinstance(shards.heldout, str):
        found: dict[str, list[dict[str, Any]]] = {}
        for client, rows in train.items():
            kept, out = hold_out(rows, fraction=shards.heldout, key=key.fold("heldout", client))
            train[client], found[client] = list(kept), list(out)
        return found
    records = read_records(shards.heldout, fields=shards.fields)
    if not isinstance(shards.split, By):
        return {client: list(records) for client in train}
    parts = partition(records, shards.split, clients=None, key=key.fold("partition"))
    strangers = parts.clients.keys() - train.keys()
    if strangers:
        raise DataError(f"{shards.heldout} holds records of {sorted(strangers)[0]}, who is no client of {shards.data}")
    return {client: [records[i] for i in parts.clients.get(client, ())] for client in train}
