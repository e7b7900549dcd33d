"""Partitioners: how records are spread over clients.

    Iid          shuffled, then cut into equal runs
    Dirichlet    each label's records spread by its own draw from Dirichlet(alpha)    arXiv:1905.12022
    By           one client for each value of a field (user, language, organisation)
    SizeSkew     sizes that grow with the client's number
    Pathological a fixed number of labels for each client                             arXiv:2102.02079
    Shard        sorted by label, cut into shards, the shards given out               arXiv:1602.05629

`Iid` and `By` give what `IidPartitioner` (on shuffled rows) and `NaturalIdPartitioner` of flwr-datasets give; the
others run that package's own partitioners. A partitioner is a frozen dataclass of settings; records and key come
as `PartitionInput`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fedllm.data.flwr_partitioners import PartitionFunction, PartitionJob, Value
from fedllm.errors import ConfigError, DataError
from fedllm.rng import Key


@dataclass(frozen=True)
class PartitionInput:
    """What a partitioner may know: how many records, the values of its field, the number of clients, the key."""

    count: int
    values: tuple[Value, ...]
    clients: int | None
    key: Key

    def order(self) -> list[int]:
        """All rows, shuffled by the key."""
        generator = self.key.fold("order").generator()
        return [int(row) for row in torch.randperm(self.count, generator=generator)]

    def number(self) -> int:
        """The number of clients.

        Raises:
            ConfigError: none is set.
        """
        if self.clients is None:
            raise ConfigError("federation.shards.clients is missing; only the partitioner 'by' does without it")
        return self.clients

    def seed(self) -> int:
        """The seed of a partitioner of flwr-datasets."""
        return self.key.fold("partitioner").seed32()


@dataclass(frozen=True)
class Partitioner:
    """Settings of one way to spread records."""

    hint: ClassVar[str] = "ask for fewer clients"  # what to change when the records cannot be spread

    @property
    def field(self) -> str | None:
        """The field of the records that the partitioner looks at."""
        return None

    def groups(self, rows: PartitionInput, run: PartitionFunction) -> Mapping[str, Sequence[int]]:
        """Each client's rows. `run` runs a partitioner of flwr-datasets."""
        raise NotImplementedError

    def _through(
        self, rows: PartitionInput, run: PartitionFunction, partitioner: str, **arguments: Any
    ) -> dict[str, list[int]]:
        """Run a partitioner on the shuffled rows."""
        clients, order = rows.number(), rows.order()
        values = tuple(rows.values[row] for row in order) if rows.values else None
        job = PartitionJob(partitioner, {"num_partitions": clients, **arguments}, rows.count, values)
        try:
            groups = run(job)
        except DataError as error:
            reason = re.split(r"(?<=[\w)])\. ", str(error), maxsplit=1)[0].rstrip(". ")
            raise DataError(
                f"{self} cannot spread {rows.count} records over {clients} clients; {self.hint} "
                f"(flwr-datasets: {reason})"
            ) from error
        return numbered([[order[place] for place in group] for group in groups])


def numbered(groups: Sequence[list[int]]) -> dict[str, list[int]]:
    """Groups under the names client-000, client-001, ..."""
    width = max(3, len(str(len(groups) - 1)))
    return {f"client-{number:0{width}}": group for number, group in enumerate(groups)}


def at_least(value: int, least: int, key: str) -> None:
    """Refuse a setting that is too small; `key` is its place below `federation.shards.partition`."""
    if value < least:
        raise ConfigError(f"federation.shards.partition.{key} is {value}; it must be {least} or more")
