"""Trees whose leaves lie together in blocks: what is done to each value takes one call a block, not one a leaf.

    block 0   | leaf 0 | 0 0 | leaf 1 | 0 | leaf 2 |      each leaf begins at a multiple of 64 bytes
    block 1   | leaf 3 | leaf 4 | 0 0 |

A call costs some microseconds, which a tree of many small leaves would pay for each of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from fedllm.tensors.layout import ALIGNMENT, LeafSpec, Place, Shape, TreeLayout, layout_of

if TYPE_CHECKING:
    from _collections_abc import dict_items, dict_values

CPU = torch.device("cpu")
Leaves = dict[str, Tensor]
_UNMADE: Any = object()


class FlatTree(Leaves):
    """A tree whose leaves are views of `blocks` (1-d; the leaves of a block share dtype and device).

    Zeros lie between them. A view is made when it is first asked for: most trees are passed on, or computed with, block
    by block. It cannot be given other leaves; `dict(tree)` can. A leaf that is kept alive keeps its block.
    """

    def __init__(self, blocks: Sequence[Tensor], layout: TreeLayout) -> None:
        super().__init__(dict.fromkeys(layout, _UNMADE))
        self.blocks, self.layout = blocks, layout

    def __getitem__(self, name: str) -> Tensor:
        leaf = super().__getitem__(name)
        if leaf is _UNMADE:
            n, shape, strides, at = self.layout[name]
            block = self.blocks[n]
            leaf = block.as_strided(shape, strides, block.storage_offset() + at)
            super().__setitem__(name, leaf)
        return leaf

    def get(self, name: str, default: Any = None) -> Any:
        """The leaf of that name, or the default."""
        return self[name] if name in self.layout else default

    def values(self) -> dict_values[str, Tensor]:
        """All leaves."""
        return self._made().values()

    def items(self) -> dict_items[str, Tensor]:
        """All names and leaves."""
        return self._made().items()

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()  # one of its own: otherwise dict(tree) and {**tree} take what is not made yet

    def __or__(self, other: Mapping[str, Tensor]) -> Leaves:  # type: ignore[override]
        return {**self, **other}

    def __eq__(self, other: object) -> bool:
        return self._made() == (other._made() if isinstance(other, FlatTree) else other)

    __hash__ = None

    def __repr__(self) -> str:
        return repr(self._made())

    def copy(self) -> Leaves:
        """The same leaves in a tree that can be changed."""
        return dict(self)

    def _made(self) -> Leaves:
        return {name: self[name] for name in self}

    def alike(self, other: Mapping[str, Tensor]) -> bool:
        """True if the other one is a flat tree with the same leaves at the same places."""
        if not isinstance(other, FlatTree) or not (self.layout is other.layout or self.layout == other.layout):
            return False
        return all(
            mine.dtype == theirs.dtype and mine.device == theirs.device
            for mine, theirs in zip(self.blocks, other.blocks, strict=True)
        )

    def ordered(self, names: Iterable[str]) -> FlatTree:
        """The same leaves, listed in another order."""
        layout = self.layout.ordered(tuple(names))
        return self if layout is self.layout else FlatTree(self.blocks, layout)

    @property
    def forms(self) -> Mapping[str, LeafSpec]:
        """Of each leaf its type and shape."""
        return self.layout.forms(tuple(block.dtype for block in self.blocks))

    def stacked(self) -> FlatTree:
        """A copy whose leaves are (1, ...)."""
        return FlatTree([block.clone() for block in self.blocks], self.layout.stacked)

    def unstacked(self) -> FlatTree | None:
        """The leaves (1, ...) as (...), in the same memory; None if one is of another shape."""
        layout = self.layout.unstacked
        return None if layout is None else FlatTree(self.blocks, layout)

    def __reduce__(self) -> tuple[type[FlatTree], tuple[Sequence[Tensor], TreeLayout]]:
        return FlatTree, (self.blocks, self.layout)  # a deep copy has blocks of its own

    def _refuse(self, *given: object, **named: object) -> NoReturn:
        raise TypeError("the leaves of a flat tree are views of its buffers; change dict(tree) instead")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse


def forms(tree: Mapping[str, Tensor]) -> Mapping[str, LeafSpec]:
    """Of each leaf its type and shape."""
    if isinstance(tree, FlatTree):
        return tree.forms
    return {name: (leaf.dtype, leaf.shape) for name, leaf in tree.items()}


def flatten(tree: Mapping[str, Tensor]) -> Leaves:
    """A copy of the tree in blocks; the tree itself where its leaves are so large that this saves less than half of the
    calls. Where a leaf lies depends on the names, shapes and types alone, not on the order in which they come."""
    if isinstance(tree, FlatTree):
        return tree
    layout, kinds, sizes = layout_of({name: (leaf.shape, (leaf.dtype, leaf.device)) for name, leaf in tree.items()})
    if not _pays(layout, sizes):
        return dict(tree)
    blocks = [torch.zeros(size, dtype=dtype, device=device) for size, (dtype, device) in zip(sizes, kinds, strict=True)]
    flat = FlatTree(blocks, layout)
    for name, leaf in tree.items():
        flat[name].copy_(leaf.detach())
    return flat


def of_bytes(leaves: Mapping[str, tuple[Shape, torch.dtype, memoryview]]) -> Leaves:
    """A tree of its own from a copy of each leaf's bytes; flat where that pays."""
    layout, kinds, sizes = layout_of({name: (shape, (dtype, CPU)) for name, (shape, dtype, _) in leaves.items()})
    if not _pays(layout, sizes):
        return {name: _tensor(*leaf) for name, leaf in leaves.items()}
    blocks = [torch.empty(size, dtype=dtype) for size, (dtype, _) in zip(sizes, kinds, strict=True)]
    memory = [_bytes(block) for block in blocks]
    for (n, _, _, at), (_, dtype, data) in zip(layout.values(), leaves.values(), strict=True):
        start = at * dtype.itemsize
        end = start + len(data)
        memory[n][start:end] = data
        if rest := -len(data) % ALIGNMENT:
            memory[n][end : end + rest] = bytes(rest)
    return FlatTree(blocks, layout)


def in_bytes(tree: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """The bytes of each leaf, row by row: its own memory where it is contiguous and on the CPU, else a copy."""
    if not isinstance(tree, FlatTree):
        yield from (_bytes(leaf) for leaf in tree.values())
        return
    blocks = [(_bytes(block), block.element_size()) for block in tree.blocks]
    for n, shape, _, at in tree.layout.values():
        memory, size = blocks[n]
        yield memory[at * size : (at + math.prod(shape)) * size]


def _pays(layout: Mapping[str, Place], sizes: Sequence[int]) -> bool:
    """Whether the blocks save half of the calls."""
    return 0 < len(sizes) * 2 <= len(layout)


def _bytes(leaf: Tensor) -> memoryview:
    found: memoryview = leaf.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data
    return found


def _tensor(shape: Shape, dtype: torch.dtype, data: memoryview) -> Tensor:
    flat = torch.empty(math.prod(shape), dtype=dtype)
    _bytes(flat)[:] = data
    return flat.reshape(shape)


def elementwise(function: Callable[..., Tensor], tree: Mapping[str, Tensor], *others: Mapping[str, Tensor]) -> Leaves:
    """function(leaf, leaf of each other tree, ...) for each leaf of `tree`; one call a block where all are alike.

    What it makes of a value must not depend on the values beside it, nor on their number, to the last bit; and it makes
    zeros of zeros.
    """
    if isinstance(tree, FlatTree) and all(tree.alike(other) for other in others):
        columns = zip(tree.blocks, *(other.blocks for other in others if isinstance(other, FlatTree)), strict=True)
        return FlatTree([function(*column) for column in columns], tree.layout)
    return {name: function(leaf, *(other[name] for other in others)) for name, leaf in tree.items()}


def copy_into(tree: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    """Give the leaves of `tree` the values of the same leaves of `source`, in place."""
    pairs = ((leaf, source[name]) for name, leaf in tree.items())
    if isinstance(tree, FlatTree) and isinstance(source, FlatTree) and tree.alike(source):
        pairs = zip(tree.blocks, source.blocks, strict=True)  # type: ignore[assignment]
    for mine, other in pairs:
        mine.copy_(other)
