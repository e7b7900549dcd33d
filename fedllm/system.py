"""What operating systems do differently: locks of folders, files that reach the disk, and memory.

`fcntl` and `resource` are there on Linux and macOS, and not on Windows. No other module of fedllm asks for either.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

import psutil  # type: ignore[import-untyped]  # it brings no types along
from filelock import FileLock, Timeout

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]
try:
    import resource
except ImportError:
    resource = None  # type: ignore[assignment]

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


def peak_memory() -> int:
    """Most bytes of memory that this process has held so far."""
    if resource is None:
        held = psutil.Process().memory_info()
        return int(getattr(held, "peak_wset", held.rss))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def held_memory() -> tuple[int, int]:
    """Bytes of memory that this process holds now, and at most so far.

    Not getrusage's peak where there is another: a process inherits it from the one that started it.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return int(psutil.Process().memory_info().rss), peak_memory()
    found = dict(re.findall(r"^(VmHWM|VmRSS):\s*(\d+) kB", status.read_text(), re.MULTILINE))
    return int(found["VmRSS"]) * 1024, int(found["VmHWM"]) * 1024


def free_memory() -> int:
    """Bytes of memory that the system has left for new use."""
    return int(psutil.virtual_memory().available)


def address_space() -> int | None:
    """The limit on this process's address space in bytes, if it has one."""
    if resource is None:
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else limit


def mapped_memory() -> int:
    """Bytes of this process's address space that are in use."""
    return int(psutil.Process().memory_info().vms)
