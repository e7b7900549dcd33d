"""Sorted by label, cut into shards, the shards given out (McMahan et al. 2017, arXiv:1602.05629, section 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedllm.data.flwr_partitioners import PartitionFunction
from fedllm.data.partitioners.base import Partitioner, PartitionInput, at_least
from fedllm.errors import ConfigError


@dataclass(frozen=True)
class Shard(Partitioner):
    """`shards` shards for each client, of `size` records; with one of the two the other follows from the data.

    What fills no shard, or is more than the clients take, is left out.
    """

    by: str
    shards: int | None = None
    size: int | None = None
    hint: ClassVar[str] = "lower shards, size or the number of clients"

    def __post_init__(self) -> None:
        if self.shards is None and self.size is None:
            raise ConfigError("federation.shards.partition.shard needs shards, size or both")
        at_least(1 if self.shards is None else self.shards, 1, "shard.shards")
        at_least(1 if self.size is None else self.size, 1, "shard.size")

    @property
    def field(self) -> str:
        """The label."""
        return self.by

    def groups(self, rows: PartitionInput, run: PartitionFunction) -> Mapping[str, Sequence[int]]:
        """`ShardPartitioner`."""
        settings = {"num_shards_per_partition": self.shards, "shard_size": self.size, "seed": rows.seed()}
        return self._through(rows, run, "ShardPartitioner", partition_by="value", **settings)
