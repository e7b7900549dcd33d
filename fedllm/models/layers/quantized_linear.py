"""Matrices in 8 or 4 bits, block by block, and the layers that compute with them.

    W[i, j] = code[i, j] * scale + low        of the block of 64 values of row i that j lies in; codes 0 .. 2^bits - 1
    scale = (largest - smallest) / (2^bits - 1)    low = smallest        in float32: 9 and 5 bits a value in all

No value is off by more than half a scale. A product makes a few rows of W at a time in the type of its input, forward
and again backward, so that W never exists as a whole and nothing of it is kept for the gradient:

    y = x W^T + bias      dx = dy W

These products are what the kernels of the adapters and the cross entropy ask of any frozen weight, so that no adapter
knows of bits. torchao, which has quantised layers too, is no dependency of fedllm, and the two were not compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

BLOCK = 64
CHUNK = 1 << 19  # values of W that exist at once
BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True, eq=False)
class Quantized:
    """A matrix (out, in), and the bias of its layer.

    codes: uint8, (out, blocks * 64), two to a byte in 4 bits: the first half of a block in the low ones. scale, low:
    (out, blocks). dtype: what it stands for.
    """

    codes: Tensor
    scale: Tensor
    low: Tensor
    size_in: int
    bits: int
    dtype: torch.dtype
    bias: Tensor | None = None

    @staticmethod
    def of(weight: Tensor, bits: int) -> Quantized:
        """From (out, in) of any floating type. A last block that is not full repeats its last value."""
        size_in = weight.shape[1]
        blocks = -(-size_in // BLOCK)
        filled = torch.cat([weight, weight[:, -1:].expand(-1, blocks * BLOCK - size_in)], 1).float()
        cut = filled.unflatten(1, (blocks, BLOCK))
        low, high = cut.aminmax(dim=2)
        scale = (high - low) / (2**bits - 1)
        codes = ((cut - low[..., None]) / scale.clamp(min=torch.finfo(scale.dtype).tiny)[..., None]).round()
        codes = codes.clamp(0, 2**bits - 1).to(torch.uint8)
        if bits == 4:
            codes = codes[..., : BLOCK // 2] | (codes[..., BLOCK // 2 :] << 4)
        return Quantized(codes.flatten(1), scale, low, size_in, bits, weight.dtype)

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return len(self.codes), self.size_in

    @property
    def is_cuda(self) -> bool:
        """Whether it lies on a GPU."""
        return self.codes.is_cuda

    def element_size(self) -> int:
        """Bytes of a value of what it stands for."""
        return self.dtype.itemsize

    def to(self, device: str) -> Quantized:
        """Itself: a layer moves with its model."""
        return self

    def rows(self, index: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """(n, in): some rows."""
        codes = self.codes[index].unflatten(1, (self.scale.shape[1], -1))
        if self.bits == 4:
            codes = torch.cat([codes & 15, codes >> 4], 2)
        wide = torch.promote_types(dtype, torch.float32)
        found = torch.addcmul(
            self.low[index][..., None].to(wide), codes.to(wide), self.scale[index][..., None].to(wide)
        )
        return found.flatten(1)[:, : self.size_in].to(dtype)

    def dense(self) -> Tensor:
        """(out, in) in the type that it stands for."""
        return self.rows(slice(None), self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(T, in) to (T, out)."""
        y = x.new_empty(len(x), len(self))
        for rows in self._cut():
            torch.mm(x, self.rows(rows, x.dtype).T, out=y[:, rows])
        return y if self.bias is None else y.add_(self.bias)

    def backward(self, dy: Tensor) -> Tensor:
        """(T, out) to (T, in)."""
        dx = dy.new_zeros(len(dy), self.size_in)
        for rows in self._cut():
            dx.addmm_(dy[:, rows], self.rows(rows, dy.dtype))
        return dx

    def _cut(self) -> list[slice]:
        size = max(1, CHUNK // self.size_in)
        return [slice(at, min(at + size, len(self))) for at in range(0, len(self), size)]


class QuantizedLinear(nn.Linear):
    """A frozen linear layer whose weight is `Quantized`. `weight` makes it anew at each look."""

    codes: Tensor
    scale: Tensor
    low: Tensor

    def __init__(self, matrix: Quantized, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = matrix.shape
        self.bits, self.dtype = matrix.bits, matrix.dtype
        for name in ("codes", "scale", "low"):
            self.register_buffer(name, getattr(matrix, name))
        self.register_parameter("bias", bias)

    @property
    def product(self) -> Quantized:
        """What it computes with."""
        return Quantized(self.codes, self.scale, self.low, self.in_features, self.bits, self.dtype, self.bias)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """(out, in)."""
        return self.product.dense()

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        y: Tensor = _Product.apply(input.flatten(0, -2), self.product)  # type: ignore[no-untyped-call]
        return y.view(*input.shape[:-1], -1)


class QuantizedEmbedding(nn.Embedding):
    """A frozen embedding whose weight is `Quantized`: of the tokens of a batch alone rows are made."""

    codes: Tensor
    scale: Tensor
    low: Tensor

    def __init__(self, matrix: Quantized, padding_idx: int | None) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = matrix.shape
        self.padding_idx, self.bits, self.dtype = padding_idx, matrix.bits, matrix.dtype
        for name in ("codes", "scale", "low"):
            self.register_buffer(name, getattr(matrix, name))

    @property
    def product(self) -> Quantized:
        """What it looks up."""
        return Quantized(self.codes, self.scale, self.low, self.embedding_dim, self.bits, self.dtype)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """(tokens, d)."""
        return self.product.dense()

    def forward(self, input: Tensor) -> Tensor:
        """(..., ) tokens to (..., d)."""
        return self.product.rows(input.flatten(), self.dtype).view(*input.shape, -1)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Quantized) -> Tensor:
        ctx.matrix = matrix
        return matrix.forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None]:
        return (ctx.matrix.backward(dy) if ctx.needs_input_grad[0] else None), None


def num_parameters(model: nn.Module) -> int:
    """Of a model, a quantised matrix counted by its values; one that is shared counts once."""
    quantised = [module for module in model.modules() if isinstance(module, QuantizedLinear | QuantizedEmbedding)]
    shapes = {module.codes.data_ptr(): module.product.shape for module in quantised}
    return sum(leaf.numel() for leaf in model.parameters()) + sum(n * m for n, m in shapes.values())
