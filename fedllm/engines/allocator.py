"""The C library's allocator: freed memory is kept while an engine is open, and all threads share one arena where memory
is scarce. And Python's garbage collector: objects that stay are left out of its collections.

A local step frees and takes the same blocks again and again. glibc gives large ones back to the system each time, and
each page of a new one costs a fault. It also has an arena for each of several threads: what one worker has freed is
not there for the next, and workers that take turns need as much as workers side by side. One arena avoids that, but two
workers that share it lose a seventh of their speed to its lock. Elsewhere than on glibc nothing changes.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fedllm.training.client_stack import LARGEST

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD, ARENA_MAX = -1, -2, -3, -8  # names of mallopt in malloc.h
HEAP = 64 << 20  # bytes of a thread's heap, of which it may have several
NEVER = (1 << 31) - 1


def single_arena() -> None:
    """All threads that start from now on share one arena, unless there are several already. To the end of the process:
    glibc does not take that back."""
    _glibc("mallopt")(ARENA_MAX, 1)


@contextmanager
def retain_freed_memory(*, emptied: bool = True) -> Iterator[None]:
    """Blocks of up to 32 MiB come from the heap, which is not trimmed until the end.

    `emptied`: heaps of other threads are kept, too, when all of one is free. glibc gives such a one back whatever the
    threshold, unless the heap before it has less room than the padding.
    """
    mallopt = _glibc("mallopt")
    mallopt(MMAP_THRESHOLD, LARGEST)
    settings = {TRIM_THRESHOLD: NEVER} | ({TOP_PAD: HEAP} if emptied else {})
    for name, value in settings.items():
        mallopt(name, value)
    try:
        yield
    finally:
        for name in settings:
            mallopt(name, 128 << 10)  # glibc's default
        trim()


@contextmanager
def freeze_gc() -> Iterator[None]:
    """Until the end, Python's garbage collector leaves out what exists now. Within another such block nothing changes.

    A full collection walks through all objects. Half a million of them belong to the modules of torch and transformers
    and to a loaded model, and none is garbage. With short sequences that takes a hundredth of a step.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.collect()  # what is garbage now would stay
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def trim() -> None:
    """What all threads have freed, back to the system: after blocks that are not taken again soon."""
    _glibc("malloc_trim")(0)


def _glibc(name: str) -> Callable[..., int]:
    """A function of glibc; elsewhere one that does nothing."""
    try:
        function: Callable[..., int] = ctypes.CDLL(None)[name]
    except (AttributeError, TypeError, OSError):  # another C library; no such handle on Windows
        return lambda *args: 0
    return function
