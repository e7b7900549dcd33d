"""The durable marker that a client has masked in a round.

Two masked vectors of one round, under other keys or of other values, could show their difference. So the marker is on
the disk before the first byte leaves: after a crash a client sends the very same bytes or is a client that dropped out.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from fedllm.errors import not_written
from fedllm.privacy.secure_aggregation.faults import RoundSpentError
from fedllm.privacy.secure_aggregation.primitives import digest


class Marker(Protocol):
    """Where a client remembers in which rounds it has masked."""

    def check(self, task: str, round: int) -> None:
        """Pass if a round is later than all that were spent; otherwise raise RoundSpentError."""

    def spend(self, task: str, round: int) -> None:
        """`check`, then mark the round."""


def _check(task: str, round: int, last: int) -> None:
    if round <= last:
        raise RoundSpentError(
            f"round {round} of {task!r} is not after round {last}, in which this client has masked; "
            "it masks once in a round, so ask for a new round"
        )


@dataclass(frozen=True)
class SpentInMemory:
    """For simulations and tests, where a client ends with its process."""

    rounds: dict[str, int] = field(default_factory=dict)

    def check(self, task: str, round: int) -> None:
        """See Marker."""
        _check(task, round, self.rounds.get(task, -1))

    def spend(self, task: str, round: int) -> None:
        """See Marker."""
        self.check(task, round)
        self.rounds[task] = round


@dataclass(frozen=True)
class SpentOnDisk:
    """A client's folder of markers: a folder for each task, with a file that is named by its last round."""

    folder: Path

    def _task(self, task: str) -> Path:
        return self.folder / digest("task", task.encode()).hex()[:32]

    def last(self, task: str) -> int:
        """The last round of a task that was spent; -1: none."""
        folder = self._task(task)
        return max((int(path.name) for path in folder.glob("[0-9]*")), default=-1) if folder.is_dir() else -1

    def check(self, task: str, round: int) -> None:
        """Pass if a round is later than all that were spent.

        Raises:
            RoundSpentError: it is not.
        """
        _check(task, round, self.last(task))

    def spend(self, task: str, round: int) -> None:
        """Mark a round; when this returns, the mark survives a loss of power.

        Raises:
            RoundSpentError: it was marked before, or a later one was.
        """
        self.check(task, round)
        folder = self._task(task)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            os.close(os.open(folder / str(round), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            for path in (folder / str(round), folder, self.folder):
                _sync(path)
        except FileExistsError as error:
            raise RoundSpentError(f"round {round} of {task!r} was spent by another process of this client") from error
        except OSError as error:
            raise not_written(folder, error) from error
        for path in folder.glob("[0-9]*"):
            if int(path.name) < round:
                path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
