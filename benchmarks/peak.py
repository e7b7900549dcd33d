"""The speed of matrix products alone: what the useful work of a training step is held against."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch

SECONDS = 0.4  # of one measurement
WIDE, TIMES = 8192, 20  # of a product on a GPU


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def gemm_peak(shapes: Iterable[tuple[int, int]], rows: int, dtype: torch.dtype, device: str = "cpu") -> float:
    """The best GFLOP/s over all shapes: one thread per core, each with its own (rows, in) x (in, out).

    On a GPU: of one product of WIDE^3, which fills it.
    """
    if device != "cpu":
        return _speed_there(device, dtype) / 1e9
    return max(_speed(rows, *shape, dtype) for shape in shapes) / 1e9


def _speed_there(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of the device."""
    x, w = (torch.randn(WIDE, WIDE, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(3):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(TIMES):
            x @ w
        torch.cuda.synchronize()
        best = max(best, 2 * TIMES * WIDE**3 / (time.perf_counter() - started))
    return best


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
