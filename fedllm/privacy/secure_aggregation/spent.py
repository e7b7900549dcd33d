"""The durable markers of a client: in which sums it has masked, and to which sum of a round it has agreed.

Two masked vectors of one sum, under other keys or of other values, could show their difference. So the marker is on
the disk before the first byte leaves: after a crash a client sends the very same bytes or is a client that dropped out.

A round that was broken off may be asked for again as another sum. Two sums of one round over different clients show
what those have sent in whom they differ. So a client that has agreed to one agrees again only to the same: over the
same clients, from the same model.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from fedllm.errors import not_written
from fedllm.privacy.secure_aggregation.faults import RoundSpentError, SurvivorsError
from fedllm.privacy.secure_aggregation.primitives import digest

KEPT = 64  # rounds before the newest, to whose sums a client remembers that it has agreed


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


def _check_agreed(step: int, before: str, now: str) -> None:
    if before != now:
        raise SurvivorsError(
            f"round {step + 1}: this client has agreed to a sum over other clients, or from another model, before; "
            "the two would show their difference, so this round has no second sum"
        )


@dataclass(frozen=True)
class SpentInMemory:
    """For simulations and tests, where a client ends with its process."""

    rounds: dict[str, int] = field(default_factory=dict)
    agreed: dict[tuple[str, int], str] = field(default_factory=dict)

    def agree(self, task: str, step: int, sum: bytes) -> None:
        """See SpentOnDisk."""
        _check_agreed(step, self.agreed.setdefault((task, step), sum.hex()), sum.hex())

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

    def agree(self, task: str, step: int, sum: bytes) -> None:
        """Mark to which sum of a round of training a client has agreed. When this returns, the mark survives a loss of
        power.

        Args:
            step: the round. sum: hash of the clients and of the model.

        Raises:
            SurvivorsError: to another one.
        """
        path = self._task(task) / f"agreed-{step}"
        try:
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("w") as file:
                    file.write(sum.hex())
                _sync(path)
                _sync(path.parent)
                for other in path.parent.glob("agreed-*"):
                    if int(other.name.removeprefix("agreed-")) < step - KEPT:
                        other.unlink(missing_ok=True)
            before = path.read_text()
        except OSError as error:
            raise not_written(path, error) from error
        _check_agreed(step, before, sum.hex())


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
