"""Files and folders that are on the disk as a whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from fedllm.errors import RunError


class atomic_folder:
    """`with atomic_folder(path) as part:` fills `part`, which becomes `path` at the end, whole or not at all."""

    def __init__(self, final: Path) -> None:
        self._final = final
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
        return RunError(
            f"{self._final} could not be written ({error.strerror or error}); what was written before it is whole: "
            "make room on the disk, then resume the run"
        )


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


def sync(path: Path) -> None:
    """Wait until a file, or the list of what a folder holds, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _hidden(folder: Path, ending: str) -> Path:
    return folder.with_name(f".{folder.name}.{ending}")
