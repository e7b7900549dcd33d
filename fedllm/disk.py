"""Files and folders that are on the disk as a whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from fedllm.errors import RunError
from fedllm.system import sync

__all__ = ["sync"]


class atomic_folder:
    """`with atomic_folder(path) as part:` fills `part`, which becomes `path` at the end, whole or not at all.

    `then`: what to do once the disk has been mended, where there is more to do than to try again.
    """

    def __init__(self, final: Path, then: str = "") -> None:
        self._final, self._then = final, then
        self._part = _hidden(final, "part")

    def __enter__(self) -> Path:
        try:
            shutil.rmtree(self._part, ignore_errors=True)
            self._part.mkdir(parents=True)
        except OSError as error:
            raise self._refusal(error) from error
        return self._part

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            try:
                sync(self._part)
                remove_folder(self._final)
                os.replace(self._part, self._final)
                sync(self._final.parent)
                return
            except OSError as caught:
                error = caught
        shutil.rmtree(self._part, ignore_errors=True)
        if isinstance(error, OSError):
            raise self._refusal(error) from error

    def _refusal(self, error: OSError) -> RunError:
        return not_written(self._final, error, self._then)


def not_written(path: Path, error: OSError, then: str = "") -> RunError:
    """The error of a file or folder that the disk refuses, with what would help.

    `then`: what to do after that; default: nothing more than to try again.
    """
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    help = "make room on the disk" if full else "choose a place that can be written to" if not then else "mend that"
    return RunError(f"{path} could not be written ({error.strerror or error}); {help}{then and f', then {then}'}")


def remove_folder(folder: Path) -> None:
    """Take a folder away, if it is there: under its name it is whole or gone, never half of it."""
    gone = _hidden(folder, "gone")
    shutil.rmtree(gone, ignore_errors=True)
    if folder.exists():
        os.replace(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)


def write_durably(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _hidden(folder: Path, ending: str) -> Path:
    return folder.with_name(f".{folder.name}.{ending}")
