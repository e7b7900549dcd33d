"""The natural partition: one client for each value of a field. What `NaturalIdPartitioner` of flwr-datasets gives."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedllm.data.flwr_partitioners import PartitionFunction, Value
from fedllm.data.partitioners.base import Partitioner, PartitionInput, at_least
from fedllm.errors import DataError

NAME_LENGTH = 64


@dataclass(frozen=True)
class By(Partitioner):
    """One client for each value of field `by`, named after it; values of fewer than `min_size` records are left out."""

    by: str
    min_size: int = 1

    def __post_init__(self) -> None:
        at_least(self.min_size, 1, "by.min_size")

    @property
    def field(self) -> str:
        """The client key."""
        return self.by

    def groups(self, rows: PartitionInput, run: PartitionFunction) -> Mapping[str, Sequence[int]]:
        """In the order of the values."""
        found: dict[Value, list[int]] = {}
        for row, value in enumerate(rows.values):
            found.setdefault(value, []).append(row)
        kept = {value: found[value] for value in sorted(found) if len(found[value]) >= self.min_size}
        if not kept:
            raise DataError(f"no value of '{self.by}' has {self.min_size} records; lower min_size")
        if rows.clients is not None and rows.clients != len(kept):
            raise DataError(
                f"'{self.by}' makes {len(kept)} clients, but federation.shards.clients is {rows.clients}; "
                f"set it to {len(kept)} or leave it out"
            )
        return {name: kept[value] for name, value in _names(kept, self.by).items()}


def client_name(value: Value) -> str:
    """A value as a name that is safe as a folder's: letters, digits, `_`, `.` and `-`, at most 64 of them."""
    text = unicodedata.normalize("NFC", str(value))
    return re.sub(r"[^\w.-]+", "-", text).strip("-.")[:NAME_LENGTH].strip("-.")


def _names(values: Mapping[Value, object], by: str) -> dict[str, Value]:
    """Name to value. Names that differ in case alone would be one folder on some systems."""
    names: dict[str, Value] = {}
    folded: dict[str, Value] = {}
    for value in values:
        name = client_name(value)
        if not name:
            raise DataError(f"value '{value}' of '{by}' has no letter or digit to name its client by; rename it")
        if name.casefold() in folded:
            other = folded[name.casefold()]
            rule = "rename one, or raise min_size if one is small"
            raise DataError(f"values '{other}' and '{value}' of '{by}' both name the client '{name}'; {rule}")
        names[name] = folded[name.casefold()] = value
    return names
