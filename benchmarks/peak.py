"""The speed of matrix products alone: what the useful work of a training step is held against."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch

SECONDS = 0.4  # of one measurement


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def gemm_peak(shapes: Iterable[tuple[int, int]], rows: int, dtype: torch.dtype) -> float:
    """The best GFLOP/s over all shapes: one thread per core, each with its own (rows, in) x (in, out)."""
    return max(_speed(rows, *shape, dtype) for shape in shapes) / 1e9


def _speed(rows: int, size_in: int, size_out: int, dtype: torch.dtype) -> float:
    """FLOP/s of all cores together."""
    together = Barrier(cores())

    def products(_: int) -> float:
        torch.set_num_threads(1)  # counts for this thread
        x, w = torch.randn(rows, size_in).to(dtype), torch.randn(size_in, size_out).to(dtype)
        out, count = torch.empty(rows, size_out, dtype=dtype), 0
        torch.mm(x, w, out=out)
        together.wait()
        started = time.perf_counter()
        while (elapsed := time.perf_counter() - started) < SECONDS:
            torch.mm(x, w, out=out)
            count += 1
        return count / elapsed

    with ThreadPoolExecutor(cores()) as pool:
        return 2 * rows * size_in * size_out * sum(pool.map(products, range(cores())))
