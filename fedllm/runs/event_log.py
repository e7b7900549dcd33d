"""The event log of a run: an append-only file, and its listeners."""

from __future__ import annotations

import os
import time
from pathlib import Path

from fedllm.errors import RunError
from fedllm.events import Emit, Event, to_json
from fedllm.files import to_json_text

BLOCK = 1 << 16  # bytes


class Log:
    """An append-only file of events with listeners (the display, the traffic meter)."""

    def __init__(self, path: Path | None, listeners: tuple[Emit, ...] = ()) -> None:
        self._path, self._listeners = path, listeners
        if path is not None:
            _drop_torn_line(path)
        # Unbuffered: a line is on its way as soon as the call returns, and none is left over to fail later.
        self._file = path.open("ab", buffering=0) if path is not None else None

    def __call__(self, event: Event) -> None:
        """Append the event, then tell the listeners.

        Raises:
            RunError: the disk is full or not writable.
        """
        if self._file is not None:
            line = to_json_text({"at": round(time.time(), 3), **to_json(event)}).encode() + b"\n"
            try:
                written = self._file.write(line)
            except OSError as error:
                raise RunError(
                    f"{self._path} cannot be written ({error.strerror}); mend that, then resume the run"
                ) from error
            if written != len(line):
                raise RunError(f"{self._path} took a part of a line only; make room on the disk, then resume the run")
        for listener in self._listeners:
            listener(event)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def _drop_torn_line(path: Path) -> None:
    """Cut off what follows the last line's end, block by block from the file's end."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - BLOCK)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        if end < size:
            file.truncate(end)
            file.flush()
            os.fsync(file.fileno())
