"""How a part's values are laid out on the wire: dense, sparse, in a few bits, or as a window, also of few bits.

    low bit   value = code * scale of its block      codes in -L..L, L = 2^(bits-1) - 1; bits = 1: -1 or +1
    sparse    positions (int32) and values of the entries that are not zero
    window    the values of a box (a range of each axis), or at chosen indices of one axis; outside of them all are zero

A wire format loses nothing: a stage puts values on the grid, the wire only writes the codes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedllm.tensors import tree

Box = tuple[tuple[int, int], ...]  # the range of each axis


@dataclass(frozen=True)
class IndexSelection:
    """Rising indices of one axis: rows of a matrix, or columns."""

    axis: int
    places: tuple[int, ...]


Window = Box | IndexSelection


@dataclass(frozen=True)
class WireFormat:
    """`bits` with one scale per block of `block` values of a leaf, or `sparse`; none of them is dense.

    Of a leaf in `windows` only that much is laid out, densely or in `bits`: the values of its blocks are the window's.
    """

    sparse: bool = False
    bits: int | None = None
    block: int = 128
    scales: Mapping[str, Tensor] = field(default_factory=dict)
    windows: Mapping[str, Window] = field(default_factory=dict)


DENSE = WireFormat()
SPARSE = WireFormat(sparse=True)


def read_window(leaf: Tensor, window: Window | None) -> Tensor:
    """The values in a leaf's window, in its order of axes. None: the leaf."""
    return leaf if window is None else leaf[_index(window)]


def write_window(held: Tensor, window: Window | None, shape: torch.Size) -> Tensor:
    """A leaf of zeros with `held` in its window. None: what is held is the leaf."""
    if window is None:
        return held
    whole = held.new_zeros(shape)
    whole[_index(window)] = held
    return whole


def _index(window: Window) -> tuple[slice | Tensor, ...]:
    if isinstance(window, IndexSelection):
        return (*[slice(None)] * window.axis, torch.tensor(window.places, dtype=torch.int64))
    return tuple(slice(*edges) for edges in window)


def num_bytes(leaves: Mapping[str, Tensor], form: WireFormat) -> int:
    """Bytes of the values of a part as they stand on the wire.

    A sparse leaf takes nnz (4 + itemsize); one of n values in `bits` takes ceil(n bits / 8) and its scales; one with a
    window as much as the values of the window.
    """
    if not form.sparse and form.bits is None and not form.windows:
        return tree.num_bytes(leaves)
    return sum(_leaf_bytes(name, leaf, form) for name, leaf in leaves.items())


def few_bits_bytes(count: int, bits: int, block: int, scale_size: int) -> int:
    """Bytes of `count` values in few bits, and of their scales."""
    return -(-count * bits // 8) + -(-count // block) * scale_size


def _leaf_bytes(name: str, leaf: Tensor, form: WireFormat) -> int:
    if form.sparse:
        return int(torch.count_nonzero(leaf)) * (4 + leaf.element_size())
    leaf = read_window(leaf, form.windows.get(name))
    if form.bits is not None and name in form.scales:
        return few_bits_bytes(leaf.numel(), form.bits, form.block, form.scales[name].element_size())
    return leaf.numel() * leaf.element_size()


def levels(bits: int) -> int:
    """The largest code of a grid: 1, 7 or 127 for 1, 4 or 8 bits."""
    return max(1, (1 << (bits - 1)) - 1)


def quantization_blocks(leaf: Tensor, block: int) -> Tensor:
    """A leaf's values as rows of `block`, the last row filled up with zeros."""
    flat = leaf.reshape(-1)
    rows = -(-flat.numel() // block)
    return torch.nn.functional.pad(flat, (0, rows * block - flat.numel())).reshape(rows, block)


def values(codes: Tensor, scales: Tensor, shape: torch.Size) -> Tensor:
    """Codes (rows, block) and scales (rows,) back to a leaf; a scale of 0 gives +0."""
    return (codes.to(scales.dtype) * scales[:, None] + 0.0).reshape(-1)[: shape.numel()].reshape(shape)


def rounded(rows: Tensor, bits: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Codes (rows, block) in -L..L and scales (rows,) of values (rows, block); the mean over draws is the values.

    Scale: the largest of a row over L. 8 and 4 bits: the code below, or the one above with probability the rest; 1 bit:
    +1 with probability (1 + x / scale) / 2.
    """
    top = levels(bits)
    scales = rows.abs().amax(1) / top
    ratio = rows / torch.where(scales == 0, torch.ones_like(scales), scales)[:, None]
    draws = torch.rand(rows.shape, generator=generator, dtype=rows.dtype).to(rows.device)
    if bits == 1:
        signs = torch.where(draws < (1 + ratio) / 2, 1.0, -1.0)
        return signs * (scales != 0)[:, None], scales
    below = ratio.floor()
    return (below + (draws < ratio - below)).clamp(-top, top), scales


def truncated(rows: Tensor, bits: int, grid: float) -> tuple[Tensor, Tensor]:
    """Codes and scales as of `rounded`, towards zero: no value grows. Scales are powers of two of at least `grid`,
    which is one, too, so that multiples of it stay such."""
    largest = rows.abs().amax(1)
    exponents = torch.frexp(largest / levels(bits)).exponent  # largest / L < 2^exponent
    scales = torch.ldexp(torch.ones_like(largest), exponents).clamp(min=grid) * (largest != 0)
    return (rows / torch.where(scales == 0, torch.ones_like(scales), scales)[:, None]).trunc(), scales


def codes(leaf: Tensor, scales: Tensor, block: int) -> Tensor:
    """The int8 codes of values that lie on the grid."""
    safe = torch.where(scales == 0, torch.ones_like(scales), scales)
    return torch.round(quantization_blocks(leaf, block) / safe[:, None]).to(torch.int8)


def on_grid(squeezed: Iterable[Tensor], scales: Iterable[Tensor], bits: int) -> bool:
    """Whether squeezed codes lie in -L..L, and scales are at least 0 and finite, L times, too: what `rounded` makes."""
    for packed in squeezed:
        raw = packed.view(torch.uint8).numpy().tobytes()
        if raw.translate(None, _OFF_GRID[bits]) != raw:
            return False
    for scale in scales:
        low, high = (float(end) for end in scale.aminmax()) if scale.numel() else (0.0, 0.0)  # both NaN where one is
        if not (low >= 0 and high * levels(bits) <= torch.finfo(scale.dtype).max):
            return False
    return True


# Bytes that hold a code below -L: -128, or a -8 in either half.
_OFF_GRID = {8: b"\x80", 4: bytes(byte for byte in range(256) if 8 in (byte & 15, byte >> 4)), 1: b""}


def pack_bits(code: Tensor, bits: int) -> Tensor:
    """Int8 codes to packed bytes: 1, 2 or 8 of them to a byte."""
    flat = code.reshape(-1)
    if bits == 8:
        return flat
    if bits == 4:
        flat = torch.nn.functional.pad(flat, (0, flat.numel() % 2)).to(torch.int16) & 15
        return (flat[0::2] | (flat[1::2] << 4)).to(torch.uint8)
    flat = torch.nn.functional.pad((flat > 0).to(torch.int32), (0, -flat.numel() % 8)).reshape(-1, 8)
    return (flat << torch.arange(8, dtype=torch.int32)).sum(1).to(torch.uint8)


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_bits`: `count` int8 codes (for 1 bit: -1 and +1)."""
    if bits == 8:
        return packed[:count]
    if bits == 4:
        wide = torch.stack([packed & 15, packed >> 4], 1).reshape(-1)[:count].to(torch.int8)
        return torch.where(wide > 7, wide - 16, wide)
    wide = (packed[:, None].to(torch.int32) >> torch.arange(8, dtype=torch.int32)) & 1
    return (wide.reshape(-1)[:count] * 2 - 1).to(torch.int8)
