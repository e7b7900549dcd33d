"""The speed of matrix products alone: what the useful work of a training step is held against."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch
from torch import Tensor

from fedllm.models.kernels import matmul
from fedllm.models.kernels.matmul import Matrix, MatrixLayout
from fedllm.models.kernels.ops import supports_product

SECONDS = 0.4  # of one measurement
WIDE, TIMES = 8192, 20  # of a product on a GPU


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def gemm_peak(shapes: Iterable[tuple[int, int]], rows: int, dtype: torch.dtype, device: str = "cpu") -> float:
    """The best GFLOP/s over all shapes, by PyTorch or by fedllm's kernel: one thread per core, each with its own (rows,
    in) x (in, out).

    On a GPU: of one product of WIDE^3, which fills it.
    """
    if device != "cpu":
        return _speed_there(device, dtype) / 1e9
    ways = [by_torch, *([by_kernel] if supports_product(torch.zeros(2, 2, dtype=dtype)) else [])]
    return max(_speed(rows, *shape, dtype, way) for shape in shapes for way in ways) / 1e9


Product = Callable[[], object]


def by_torch(x: Tensor, w: Tensor) -> Product:
    """x W by PyTorch."""
    out = torch.empty(len(x), w.shape[1], dtype=x.dtype)
    return lambda: torch.mm(x, w, out=out)


def by_kernel(x: Tensor, w: Tensor) -> Product:
    """x W by the kernel, W laid out."""
    plain = Matrix(w, MatrixLayout.PLAIN)
    ready = Matrix(w, MatrixLayout.PLAIN, matmul.laid_out(plain))
    return lambda: matmul.product(x, ready)


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


def _speed(
    rows: int, size_in: int, size_out: int, dtype: torch.dtype, way: Callable[[Tensor, Tensor], Product]
) -> float:
    """FLOP/s of all cores together."""
    together = Barrier(cores())

    def products(_: int) -> float:
        torch.set_num_threads(1)  # counts for this thread
        x, w = torch.randn(rows, size_in).to(dtype), torch.randn(size_in, size_out).to(dtype)
        multiply, count = way(x, w), 0
        multiply()
        together.wait()
        started = time.perf_counter()
        while (elapsed := time.perf_counter() - started) < SECONDS:
            multiply()
            count += 1
        return count / elapsed

    with ThreadPoolExecutor(cores()) as pool:
        return 2 * rows * size_in * size_out * sum(pool.map(products, range(cores())))
