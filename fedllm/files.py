"""Files: the cache folder, files that are whole or absent, folders that one process at a time may use, and JSON.

`fcntl` is there on Linux and macOS, and not on Windows.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import StringIO
from pathlib import Path
from threading import Lock
from typing import Any

from filelock import FileLock, Timeout

from fedllm.errors import RunError, not_written


def cache_dir() -> Path:
    """`$FEDLLM_CACHE`, else `$XDG_CACHE_HOME/fedllm`, else `~/.cache/fedllm`. It need not exist."""
    if chosen := os.environ.get("FEDLLM_CACHE"):
        return Path(chosen).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "fedllm"
    return Path.home() / ".cache" / "fedllm"


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


def write_secret_once(path: Path, data: bytes) -> None:
    """Write a file that its owner alone can read, and wait until it is on the disk. Of several processes that do so at
    once the first one's stays; it is never there in part."""
    part = path.with_name(f"{path.name}.part-{os.urandom(8).hex()}")
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(part, path)
        sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


def _hidden(folder: Path, ending: str) -> Path:
    return folder.with_name(f".{folder.name}.{ending}")


def to_json_text(value: Any, indent: int | None = None) -> str:
    """The text of plain values. Numbers that are not finite are null."""
    try:
        return _written(value, indent)
    except ValueError:  # rare, so that others do not pay for a look at every number
        return _written(finite_only(value), indent)


def finite_only(value: Any) -> Any:
    """Plain values with None in place of numbers that are not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite_only(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_only(item) for item in value]
    return value


def _written(value: Any, indent: int | None) -> str:
    if indent is None:
        return json.dumps(value, allow_nan=False)
    text = StringIO()  # json.dumps would hold every word of many clients as an object of its own
    json.dump(value, text, indent=indent, allow_nan=False)
    return text.getvalue()


try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

_seeking = Lock()


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder. One that dies lets go of it.

    Raises:
        BlockingIOError: another process is in it.
    """
    if fcntl is None:
        with _lock_file(folder.with_name(f".{folder.name}.lock")):
            yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


@contextmanager
def _lock_file(path: Path) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise BlockingIOError(str(error)) from error
    try:
        yield
    finally:
        lock.release()


def sync(path: Path) -> None:
    """Wait until a file, or the list of what a folder holds, is on the disk. Windows has no such list to wait for."""
    windows = os.name == "nt"
    if windows and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_at(handle: int, size: int, start: int) -> bytes:
    """Bytes of an open file from a place on. Threads may share the handle."""
    if hasattr(os, "pread"):
        return os.pread(handle, size, start)
    with _seeking:
        os.lseek(handle, start, os.SEEK_SET)
        return os.read(handle, size)
