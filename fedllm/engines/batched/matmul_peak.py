"""How fast the workers multiply matrices of the model's own shapes: what a share of the peak is a share of."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedllm.models.kernels import matmul
from fedllm.models.kernels.matmul import Matrix, MatrixLayout
from fedllm.models.kernels.ops import supports_product
from fedllm.models.layers.linear import linear_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS, SECONDS, WINDOWS = 512, 0.05, 4  # the best window counts: other work may take a part of any


def matmul_peak(pool: ThreadPoolExecutor, workers: int, model: PreTrainedModel) -> float:
    """Floating-point operations a second of all workers together, (512, in) x (in, out) in the model's type, for the
    largest linear layer but the head, or the head where there is none. By PyTorch or by a kernel: the faster counts."""
    linears = [*linear_layers(model).values()] or [model.get_output_embeddings()]
    weight = max((layer.weight for layer in linears), key=torch.Tensor.numel)
    x = torch.ones(ROWS, weight.shape[1], dtype=weight.dtype, device=weight.device)

    by_kernel = supports_product(weight)
    laid_out = matmul.laid_out(Matrix(weight, MatrixLayout.TURNED)) if by_kernel else None
    ready = Matrix(weight, MatrixLayout.TURNED, laid_out)
    ways: list[Callable[[], Tensor]] = [
        lambda: x @ weight.T,
        *([lambda: matmul.product(x, ready)] if by_kernel else []),
    ]

    def window(multiply: Callable[[], Tensor]) -> float:
        count, started = 0, perf_counter()
        while (seconds := perf_counter() - started) < SECONDS:
            for _ in range(4):
                multiply()
            if x.is_cuda:
                torch.cuda.synchronize()
            count += 4
        return 2 * count * ROWS * weight.numel() / seconds

    def measured() -> float:
        for multiply in ways:
            multiply()
        return max(window(multiply) for _ in range(WINDOWS) for multiply in ways)

    with torch.no_grad():
        return sum(job.result() for job in [pool.submit(measured) for _ in range(workers)])
