"""A fixed number of labels for each client (Li et al. 2022, arXiv:2102.02079, section IV)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from fedllm.data.flwr_partitioners import PartitionFunction
from fedllm.data.partitioners.base import Partitioner, PartitionInput, at_least


@dataclass(frozen=True)
class Pathological(Partitioner):
    """Exactly `classes` labels for each client. `assignment` "random" may leave labels, and their records, out."""

    by: str
    classes: int = 2
    assignment: Literal["random", "deterministic", "first-deterministic"] = "first-deterministic"
    hint: ClassVar[str] = "lower classes, or change the number of clients or the assignment"

    def __post_init__(self) -> None:
        at_least(self.classes, 1, "pathological.classes")

    @property
    def field(self) -> str:
        """The label."""
        return self.by

    def groups(self, rows: PartitionInput, run: PartitionFunction) -> Mapping[str, Sequence[int]]:
        """`PathologicalPartitioner`."""
        settings = {"class_assignment_mode": self.assignment, "seed": rows.seed()}
        arguments = {"partition_by": "value", "num_classes_per_partition": self.classes, **settings}
        return self._through(rows, run, "PathologicalPartitioner", **arguments)
