"""What a process holds of memory, and what there is: `resource` where the system has it, else `psutil`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # it brings no types along

try:
    import resource
except ImportError:
    resource = None  # type: ignore[assignment]


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
