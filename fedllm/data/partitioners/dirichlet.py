"""Label skew by a Dirichlet distribution (Yurochkin et al. 2019, arXiv:1905.12022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedllm.data.flwr_partitioners import PartitionFunction
from fedllm.data.partitioners.base import Partitioner, PartitionInput, at_least
from fedllm.errors import ConfigError


@dataclass(frozen=True)
class Dirichlet(Partitioner):
    """Label skew: small `alpha`, few labels per client. `by` names the label; drawn anew until each has `min_size`."""

    alpha: float
    by: str
    min_size: int = 1
    hint: ClassVar[str] = "raise alpha, or lower min_size or the number of clients"

    def __post_init__(self) -> None:
        at_least(self.min_size, 1, "dirichlet.min_size")
        if not 0 < self.alpha < float("inf"):
            raise ConfigError(f"federation.shards.partition.dirichlet.alpha is {self.alpha}; it must be more than 0")

    @property
    def field(self) -> str:
        """The label."""
        return self.by

    def groups(self, rows: PartitionInput, run: PartitionFunction) -> Mapping[str, Sequence[int]]:
        """`DirichletPartitioner`."""
        settings = {"alpha": float(self.alpha), "min_partition_size": self.min_size, "seed": rows.seed()}
        return self._through(rows, run, "DirichletPartitioner", partition_by="value", **settings)
