"""The Ray engine with actors that outlive a run: starting them takes longer than a run of a test does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedllm.engines.base import Engine
from fedllm.engines.remote.ray import RayActors
from fedllm.engines.remote.worker import RemoteWorker
from fedllm.engines.torch_threads import one_thread
from fedllm.events import Emit
from fedllm.experiment.record import Experiment
from fedllm.messages.call import Call


@dataclass(frozen=True)
class Kept(Engine):
    """The engine."""

    actors: RayActors
    stack: int = 1

    @contextmanager
    def open(self, experiment: Experiment, folder: Path | None, emit: Emit) -> Iterator[Call]:
        """As the Ray engine, once its actors are there."""
        with one_thread(), self.actors.serving(experiment, folder, self.stack, emit) as call:
            yield call


# What a test has an actor do, with Ray's `__ray_call__`.


def pid(worker: RemoteWorker) -> int:
    """The process."""
    return os.getpid()
