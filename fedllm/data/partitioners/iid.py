"""Independent and identically distributed: what `IidPartitioner` of flwr-datasets gives on shuffled rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from fedllm.data.flwr_partitioners import PartitionFunction
from fedllm.data.partitioners.base import Partitioner, PartitionInput, numbered


@dataclass(frozen=True)
class Iid(Partitioner):
    """Shuffled, then cut into runs whose lengths differ by one at most."""

    def groups(self, rows: PartitionInput, run: PartitionFunction) -> Mapping[str, Sequence[int]]:
        """The first `count % clients` clients hold one record more."""
        clients, order = rows.number(), rows.order()
        size, rest = divmod(rows.count, clients)
        starts = [client * size + min(client, rest) for client in range(clients + 1)]
        return numbered([order[start:stop] for start, stop in pairwise(starts)])
