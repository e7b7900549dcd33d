"""Threads that compute a kernel together: those of the calling thread's team (team.c)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fedllm.models.kernels.build import library
from fedllm.models.kernels.ctypes_calls import call


@contextmanager
def kernel_threads(count: int) -> Iterator[None]:
    """Kernels that the calling thread calls run on so many threads, until the end; their bits do not depend on it."""
    there = count > 1 and library().handle is not None
    if there:
        call("threads", count)
    try:
        yield
    finally:
        if there:
            call("threads", 1)
