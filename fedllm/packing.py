"""How a part's values are laid out on the wire: dense, sparse, in a few bits, or as a window, also of few bits.

    low bit   value = code * scale of its block      codes in -L..L, L = 2^(bits-1) - 1; bits = 1: -1 or +1
    sparse    positions (int32) and values of the entries that are not zero
    window    the values of a box (a range of each axis) outside of which all are zero

Packing loses nothing: a stage puts values on the grid, the wire only writes the codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Window = tuple[tuple[int, int], ...]  # the range of each axis


@dataclass(frozen=True)
class Packing:
    """`bits` with one scale per block of `block` values of a leaf, or `sparse`; none of them is dense.

    Of a leaf in `windows` only a box is laid out, densely or in `bits`: the values of its blocks are the box's.
    """

    sparse: bool = False
    bits: int | None = None
    block: int = 128
    scales: Mapping[str, Tensor] = field(default_factory=dict)
    windows: Mapping[str, Window] = field(default_factory=dict)


DENSE = Packing()
SPARSE = Packing(sparse=True)


def inside(leaf: Tensor, window: Window | None) -> Tensor:
    """The view of a leaf's window. None: the leaf."""
    return leaf if window is None else leaf[tuple(slice(*edges) for edges in window)]


def among_zeros(box: Tensor, window: Window | None, shape: torch.Size) -> Tensor:
    """A leaf of zeros with `box` in its window. None: the box is the leaf."""
    if window is None:
        return box
    whole = box.new_zeros(shape)
    inside(whole, window).copy_(box)
    return whole


def levels(bits: int) -> int:
    """The largest code of a grid: 1, 7 or 127 for 1, 4 or 8 bits."""
    return max(1, (1 << (bits - 1)) - 1)


def blocks(leaf: Tensor, block: int) -> Tensor:
    """A leaf's values as rows of `block`, the last row filled up with zeros."""
    flat = leaf.reshape(-1)
    rows = -(-flat.numel() // block)
    return torch.nn.functional.pad(flat, (0, rows * block - flat.numel())).reshape(rows, block)


def values(codes: Tensor, scales: Tensor, shape: torch.Size) -> Tensor:
    """Codes (rows, block) and scales (rows,) back to a leaf; a scale of 0 gives +0."""
    return (codes.to(scales.dtype) * scales[:, None] + 0.0).reshape(-1)[: shape.numel()].reshape(shape)


def codes(leaf: Tensor, scales: Tensor, block: int) -> Tensor:
    """The int8 codes of values that lie on the grid."""
    safe = torch.where(scales == 0, torch.ones_like(scales), scales)
    return torch.round(blocks(leaf, block) / safe[:, None]).to(torch.int8)


def squeeze(code: Tensor, bits: int) -> Tensor:
    """Int8 codes to packed bytes: 1, 2 or 8 of them to a byte."""
    flat = code.reshape(-1)
    if bits == 8:
        return flat
    if bits == 4:
        flat = torch.nn.functional.pad(flat, (0, flat.numel() % 2)).to(torch.int16) & 15
        return (flat[0::2] | (flat[1::2] << 4)).to(torch.uint8)
    flat = torch.nn.functional.pad((flat > 0).to(torch.int32), (0, -flat.numel() % 8)).reshape(-1, 8)
    return (flat << torch.arange(8, dtype=torch.int32)).sum(1).to(torch.uint8)


def unsqueeze(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `squeeze`: `count` int8 codes (for 1 bit: -1 and +1)."""
    if bits == 8:
        return packed[:count]
    if bits == 4:
        wide = torch.stack([packed & 15, packed >> 4], 1).reshape(-1)[:count].to(torch.int8)
        return torch.where(wide > 7, wide - 16, wide)
    wide = (packed[:, None].to(torch.int32) >> torch.arange(8, dtype=torch.int32)) & 1
    return (wide.reshape(-1)[:count] * 2 - 1).to(torch.int8)
