"""Partition: records spread over clients, and what the spread looks like."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import log2
from typing import Any, NamedTuple

from fedllm.data import flwr_partitioners
from fedllm.data.flwr_partitioners import PartitionFunction, Value
from fedllm.data.partitioners.base import Partitioner, PartitionInput
from fedllm.errors import ConfigError, DataError, nearest
from fedllm.rng import Key

Records = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Partition:
    """Each client's rows (indices into the records, ascending); no row twice. `left_out`: rows that no client holds."""

    clients: Mapping[str, tuple[int, ...]]
    left_out: int


class Report(NamedTuple):
    """`counts`: records per client. `labels`: per client, records per label. `divergence`: see `divergence`."""

    counts: dict[str, int]
    labels: dict[str, dict[str, int]]
    divergence: float | None


def partition(
    records: Records,
    partitioner: Partitioner,
    *,
    clients: int | None,
    key: Key,
    run: PartitionFunction = flwr_partitioners.run,
) -> Partition:
    """Spread records over clients: the same for the same records, partitioner, number and key.

    Args:
        clients: how many; None only where the partitioner itself knows (`By`).
        run: runs a partitioner of flwr-datasets, by default in a process of its own.

    Raises:
        ConfigError: the number of clients is missing or below 1.
        DataError: a field is missing, the records do not suffice, or a client is left empty.
        MissingExtra: the partitioner needs flwr-datasets, which is not installed.
    """
    if clients is not None and clients < 1:
        raise ConfigError(f"federation.shards.clients is {clients}; it must be 1 or more")
    if clients is not None and clients > len(records):
        raise DataError(f"there are {len(records)} records for {clients} clients; ask for fewer clients")
    values = () if partitioner.field is None else column(records, partitioner.field)
    groups = partitioner.groups(PartitionInput(len(records), values, clients, key), run)
    for client, rows in groups.items():
        if not rows:
            raise DataError(
                f"client '{client}' of {len(groups)} gets no records from {partitioner}; {partitioner.hint}"
            )
    taken = [row for rows in groups.values() for row in rows]
    assert len(set(taken)) == len(taken), "a record was given to two clients"
    return Partition({client: tuple(sorted(rows)) for client, rows in groups.items()}, len(records) - len(taken))


def column(records: Records, field: str) -> tuple[Value, ...]:
    """A field of all records: whole numbers if all are, else text.

    Raises:
        DataError: a record has no such field, or none that can be a label.
    """
    values: list[Value] = []
    known: dict[tuple[type, Value], Value] = {}  # equal values are one object: a column may be long
    for number, record in enumerate(records, 1):
        if field not in record:
            raise DataError(f"record {number} has no field '{field}'{nearest(field, record)}")
        value = record[field]
        if value is None or value == "" or isinstance(value, (list, dict)):
            raise DataError(f"field '{field}' of record {number} is {value!r}; it must be text or a number")
        found = value if type(value) is int else str(value)
        values.append(known.setdefault((type(found), found), found))
    return tuple(values if all(isinstance(value, int) for value in values) else map(str, values))


def report(records: Records, partition: Partition, label_field: str | None) -> Report:
    """What the clients hold. Without a label field there are no labels and no divergence."""
    counts = {client: len(rows) for client, rows in partition.clients.items()}
    if label_field is None:
        return Report(counts, {}, None)
    values = column(records, label_field)
    labels = {client: Counter(str(values[row]) for row in rows) for client, rows in partition.clients.items()}
    return Report(counts, {client: dict(sorted(found.items())) for client, found in labels.items()}, divergence(labels))


def divergence(labels: Mapping[str, Mapping[str, int]]) -> float:
    """How far the clients' label histograms p_k are from the pooled one q, in bits: 0 (alike) to 1.

    mean_k JS(p_k, q),   JS(p, q) = H((p + q) / 2) - (H(p) + H(q)) / 2,   H the entropy to base 2;
    each client counts once, whatever its size; q is over all records that clients hold.

    A label that client k lacks adds h(q_l / 2) = (h(q_l) + q_l) / 2 to the first entropy, h(x) = -x log2 x; these are
    taken from their sums over all labels, so that the work grows with what clients hold and not with clients x labels.
    """
    pooled: Counter[str] = Counter()
    for found in labels.values():
        pooled.update(found)
    total = sum(pooled.values())
    q = {name: count / total for name, count in pooled.items()}
    whole = _entropy(q.values())
    return sum(_jensen_shannon(found, q, whole) for found in labels.values()) / len(labels)


def _jensen_shannon(found: Mapping[str, int], q: Mapping[str, float], whole: float) -> float:
    total = sum(found.values())
    p = {name: count / total for name, count in found.items()}
    own = [q[name] for name in p]
    absent = (max(0.0, whole - _entropy(own)) + max(0.0, 1.0 - sum(own))) / 2
    middle = _entropy((share + q[name]) / 2 for name, share in p.items()) + absent
    return max(0.0, middle - (_entropy(p.values()) + whole) / 2)


def _entropy(shares: Iterable[float]) -> float:
    return -sum(share * log2(share) for share in shares if share > 0)
