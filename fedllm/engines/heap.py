"""The C library's heap: keep freed memory while an engine is open.

A local step frees and takes the same blocks again and again. glibc gives large ones back to the system each time, and
each page of a new one costs a fault. Elsewhere than on glibc nothing changes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # names of mallopt in malloc.h
LARGEST = 32 << 20  # bytes; glibc refuses a larger threshold
NEVER = (1 << 31) - 1


@contextmanager
def kept_memory() -> Iterator[None]:
    """Blocks of up to 32 MiB come from the heap, which is not trimmed until the end."""
    libc = ctypes.CDLL(None)
    try:
        mallopt, malloc_trim = libc.mallopt, libc.malloc_trim
    except AttributeError:
        yield
        return
    mallopt(MMAP_THRESHOLD, LARGEST)
    mallopt(TRIM_THRESHOLD, NEVER)
    try:
        yield
    finally:
        mallopt(TRIM_THRESHOLD, 128 << 10)  # glibc's default
        malloc_trim(0)
