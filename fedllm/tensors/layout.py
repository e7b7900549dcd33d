"""Where the leaves of a tree lie in blocks of memory; it depends on their names, shapes and types alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import accumulate
from operator import mul
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from functools import _lru_cache_wrapper as Cached

ALIGNMENT = 64  # bytes, as torch's own: products may differ in their last bits where memory is aligned otherwise
REMEMBERED = 1 << 17  # letters of the names of a tree whose places are kept: names come from elsewhere, too
BLOCK_BYTES = 1 << 20  # malloc maps larger ones anew for each result, which costs more than the calls

Shape = tuple[int, ...]
Place = tuple[int, Shape, Shape, int]  # block, shape, strides, offset in the block
Kind = tuple[torch.dtype, torch.device]
LeafSpec = tuple[torch.dtype, torch.Size]
Found = TypeVar("Found")


class TreeLayout(dict[str, Place]):
    """Where the leaves of flat trees lie. It never changes: what follows from it is worked out once for all."""

    @cached_property
    def shapes(self) -> Mapping[str, torch.Size]:
        """Of each leaf."""
        return {name: torch.Size(shape) for name, (_, shape, _, _) in self.items()}

    @cached_property
    def stacked(self) -> TreeLayout:
        """With leaves (1, ...)."""
        return TreeLayout(
            {name: (n, (1, *shape), (math.prod(shape), *strides), at) for name, (n, shape, strides, at) in self.items()}
        )

    @cached_property
    def unstacked(self) -> TreeLayout | None:
        """The leaves (1, ...) as (...); None if one is of another shape."""
        if any(shape[:1] != (1,) for _, shape, _, _ in self.values()):
            return None
        return TreeLayout({name: (n, shape[1:], strides[1:], at) for name, (n, shape, strides, at) in self.items()})

    def forms(self, dtypes: tuple[torch.dtype, ...]) -> Mapping[str, LeafSpec]:
        """Of each leaf its type and shape, in blocks of some types."""
        if dtypes not in self._forms:
            self._forms[dtypes] = {name: (dtypes[self[name][0]], shape) for name, shape in self.shapes.items()}
        return self._forms[dtypes]

    def ordered(self, names: tuple[str, ...]) -> TreeLayout:
        """The same, listed in another order."""
        if names not in self._orders:
            self._orders[names] = self if names == tuple(self) else TreeLayout({name: self[name] for name in names})
        return self._orders[names]

    @cached_property
    def _forms(self) -> dict[tuple[torch.dtype, ...], Mapping[str, LeafSpec]]:
        return {}

    @cached_property
    def _orders(self) -> dict[tuple[str, ...], TreeLayout]:
        return {}


def layout_of(leaves: Mapping[str, tuple[Shape, Kind]]) -> tuple[TreeLayout, Sequence[Kind], Sequence[int]]:
    """The place of each leaf, and of each block its kind and its size in values."""
    return remembered(_placed, sum(map(len, leaves)))(tuple(leaves.items()), BLOCK_BYTES)


def remembered(function: Cached[Found], letters: int) -> Callable[..., Found]:
    """A function that keeps what it found, for arguments of so many letters; for long ones without keeping it."""
    return function if letters <= REMEMBERED else function.__wrapped__


@lru_cache(maxsize=64)  # a round's trees have few forms
def _placed(
    leaves: tuple[tuple[str, tuple[Shape, Kind]], ...], most: int
) -> tuple[TreeLayout, tuple[Kind, ...], tuple[int, ...]]:
    layout: dict[str, Place] = {}
    kinds: list[Kind] = []
    sizes: list[int] = []
    for name, (shape, kind) in sorted(leaves, key=lambda leaf: (str(leaf[1][1][0]), leaf[0])):
        size, bytes_each = math.prod(shape), kind[0].itemsize
        if not sizes or kind != kinds[-1] or (sizes[-1] + size) * bytes_each > most:
            kinds.append(kind)
            sizes.append(0)
        layout[name] = (len(sizes) - 1, tuple(shape), _strides(shape), sizes[-1])
        sizes[-1] += -(-size * bytes_each // ALIGNMENT) * ALIGNMENT // bytes_each
    return TreeLayout({name: layout[name] for name, _ in leaves}), tuple(kinds), tuple(sizes)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a contiguous tensor: the product of the sizes behind each axis, in one pass."""
    if not shape:
        return ()
    return tuple(accumulate(reversed(shape[1:]), mul, initial=1))[::-1]
