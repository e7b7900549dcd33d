"""Engines: where clients run. An engine changes speed, never results."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from fedllm.events import Emit
from fedllm.experiment.record import Experiment
from fedllm.messages.call import Call


class Engine:
    """Starts workers, answers calls, stops them. A frozen dataclass of settings that change no result."""

    @property
    def stacks(self) -> bool:
        """True if it trains several clients in one pass: the work, the adapter and the model must allow it."""
        return False

    @property
    def simulates(self) -> bool:
        """True if whoever runs it plays all clients. Elsewhere draws that everybody can repeat hide nothing."""
        return True

    def open(self, experiment: Experiment, folder: Path | None, emit: Emit) -> AbstractContextManager[Call]:
        """A call that reaches the clients. `folder` holds the clients' memories; `emit` hears of every message."""
        raise NotImplementedError
