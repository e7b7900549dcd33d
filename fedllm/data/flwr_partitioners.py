"""Partitioners of flwr-datasets, run in a short-lived process of their own.

They need `datasets`, pandas and more, some 190 MB that a training process should not carry. A job and its answer are
plain numbers; the answer is kept in the cache folder (row numbers only, nothing of the data), so that a second run
with the same data, settings and key starts no process.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from fedllm.errors import DataError, MissingExtra
from fedllm.files import cache_dir

WORKER = Path(__file__).with_name("hub_worker.py")
SECONDS = 900.0  # a worker that takes longer is stopped

Value = str | int
Groups = list[list[int]]


@dataclass(frozen=True)
class PartitionJob:
    """One use of a partitioner: its class and arguments, and the rows' number and values of the column "value"."""

    partitioner: str
    arguments: Mapping[str, Any]
    count: int
    values: tuple[Value, ...] | None = None


PartitionFunction = Callable[[PartitionJob], Groups]


def run(job: PartitionJob) -> Groups:
    """The rows of each partition, from the cache or from a worker.

    Raises:
        DataError: the partitioner refuses (its own first sentence), or the worker fails.
        MissingExtra: flwr-datasets is not installed.
    """
    text = json.dumps(asdict(job), sort_keys=True)
    path = cache_dir() / "partitions" / f"{_digest(text)}.json"
    groups = _cached(path, job.count)
    if groups is None:
        groups = _worked_out(text)
        with contextlib.suppress(OSError):  # a cache that cannot be written to costs time, nothing else
            _keep(path, groups)
    return groups


def _digest(text: str) -> str:
    try:
        versions = [metadata.version(package) for package in ("flwr-datasets", "datasets")]
    except metadata.PackageNotFoundError as error:
        raise MissingExtra("flwr-datasets", "data") from error
    return hashlib.sha256("\0".join([*versions, text]).encode()).hexdigest()


def _cached(path: Path, count: int) -> Groups | None:
    """What the cache holds, if it is whole: lists of row numbers, none of them twice."""
    try:
        groups = json.loads(path.read_text("utf-8"))
        rows = [row for group in groups for row in group]
    except (OSError, ValueError, TypeError):
        return None
    sound = (
        isinstance(groups, list)
        and all(type(row) is int and 0 <= row < count for row in rows)
        and len(set(rows)) == len(rows)
    )
    return groups if sound else None


def _worked_out(text: str) -> Groups:
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", str(WORKER)]
    environment = {**os.environ, **quiet}
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, encoding="utf-8", env=environment, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise DataError(f"the partitioner took more than {SECONDS:.0f} s") from error
    if done.returncode != 0:
        raise DataError(f"the partitioner failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise DataError(answer["error"])
    groups: Groups = answer["groups"]
    return groups


def _keep(path: Path, groups: Groups) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
        json.dump(groups, file)
    os.replace(file.name, path)  # whole or not at all
