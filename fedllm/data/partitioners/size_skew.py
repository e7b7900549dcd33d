"""Sizes that grow with the client's number; labels as they fall."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fedllm.data.flwr_partitioners import PartitionFunction
from fedllm.data.partitioners.base import Partitioner, PartitionInput


@dataclass(frozen=True)
class SizeSkew(Partitioner):
    """Client i of 1..n holds a share in proportion to i ("linear"), i^2 ("square") or e^i ("exponential")."""

    kind: Literal["linear", "square", "exponential"] = "linear"

    def groups(self, rows: PartitionInput, run: PartitionFunction) -> Mapping[str, Sequence[int]]:
        """`LinearPartitioner`, `SquarePartitioner` or `ExponentialPartitioner`."""
        return self._through(rows, run, f"{self.kind.capitalize()}Partitioner")
