"""The one file that touches `datasets` and `flwr_datasets`: a table from the hub, and the partitioners.

Both bring pandas and more, so they are imported inside the functions. Run as a script, this file is the partition
worker: a job as JSON on standard input, the answer as JSON on standard output. It imports nothing of fedllm, so the
worker starts without torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any

PARTITIONERS = (
    *("DirichletPartitioner", "PathologicalPartitioner", "ShardPartitioner"),
    *("LinearPartitioner", "SquarePartitioner", "ExponentialPartitioner"),
)


def hub(name: str, config: str | None, split: str) -> Iterable[dict[str, Any]]:
    """One split of a data set of the hub, or of the hub's local cache when offline."""
    _without_telemetry()
    import datasets

    table: Iterable[dict[str, Any]] = datasets.load_dataset(name, config, split=split)
    return table


def assign(job: Mapping[str, Any]) -> list[list[int]]:
    """The rows of each partition.

    Args:
        job: `partitioner`, a name out of PARTITIONERS; its `arguments`; `count` rows with their `values` (or None).

    Raises:
        ValueError: the partitioner refuses, in its own words.
    """
    _without_telemetry()
    from datasets import Dataset
    from flwr_datasets import partitioner

    known = {name: vars(partitioner)[name] for name in PARTITIONERS}
    values = {} if job["values"] is None else {"value": [_whole(value) for value in job["values"]]}
    made = known[job["partitioner"]](**job["arguments"])
    made.dataset = Dataset.from_dict({"row": list(range(job["count"])), **values})
    try:
        return [list(made.load_partition(index)["row"]) for index in range(made.num_partitions)]
    except ZeroDivisionError as error:  # what ShardPartitioner runs into with fewer rows than shards
        raise ValueError("there are fewer records than shards") from error


def _whole(value: Any) -> Any:
    """A label that numpy keeps as it is: it drops zero characters from the end of a text."""
    return value.replace("\0", "\N{SYMBOL FOR NULL}") if isinstance(value, str) else value


def main() -> None:
    """Answer one job: {"groups": [[row, ...], ...]} or {"error": sentence}."""
    job = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):
        try:
            answer: dict[str, Any] = {"groups": assign(job)}
        except ValueError as error:
            answer = {"error": str(error)}
    json.dump(answer, sys.stdout)


def _without_telemetry() -> None:
    os.environ.update({"FLWR_TELEMETRY_ENABLED": "0", "HF_HUB_DISABLE_TELEMETRY": "1"})


if __name__ == "__main__":
    main()
