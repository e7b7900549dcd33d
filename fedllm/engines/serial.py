"""One client after another in this process: the reference that every other engine must equal.

The base model is loaded once; requests and updates pass through `wire.py`, so bytes are counted as sent. One intra-op
thread: its bits do not depend on the number of cores.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedllm.aggregate import Call
from fedllm.client import Site
from fedllm.engine import Engine
from fedllm.engines.exchange import one_by_one, tidied
from fedllm.engines.threads import one_thread
from fedllm.events import Emit
from fedllm.experiment import Experiment
from fedllm.heap import kept_memory


@dataclass(frozen=True)
class Serial(Engine):
    """The serial engine."""

    @contextmanager
    def open(self, experiment: Experiment, folder: Path | None, emit: Emit) -> Iterator[Call]:
        """Load the task and the clients' data; answer calls until closed."""
        with one_thread(), kept_memory():
            yield tidied(one_by_one(Site.of(experiment, folder), emit))
