"""One client after another in this process: the reference that every other engine must equal.

The base model is loaded once. Requests and updates pass through `messages/serialization.py`, so that bytes are
counted as they would be sent. One intra-op thread: its bits do not depend on the number of cores.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedllm.engines.allocator import retain_freed_memory
from fedllm.engines.base import Engine
from fedllm.engines.client import Site
from fedllm.engines.loopback import one_by_one, with_heap_trim
from fedllm.engines.torch_threads import one_thread
from fedllm.events import Emit
from fedllm.experiment.record import Experiment
from fedllm.messages.call import Call


@dataclass(frozen=True)
class Serial(Engine):
    """The serial engine."""

    @contextmanager
    def open(self, experiment: Experiment, folder: Path | None, emit: Emit) -> Iterator[Call]:
        """Load the task and the clients' data; answer calls until closed."""
        with one_thread(), retain_freed_memory():
            yield with_heap_trim(one_by_one(Site.of(experiment, folder), emit))
