"""The tensors of K clients in one buffer: an optimiser step, a norm or a difference is one operation a client.

    buffer (K, P)        tensor n of the stack: buffer[:, at : at + size] as (K, *shape); row k is client k's flat tree

Clients whose tensors differ in size (ranks of a low-rank adapter) are padded with zeros to the largest.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate, pairwise
from typing import TypeGuard

import torch
from torch import Tensor

from fedllm.tensors import tree
from fedllm.tensors.flat_tree import FlatTree, copy_into
from fedllm.tensors.layout import TreeLayout, layout_of
from fedllm.tensors.tree import Tree

Shapes = Mapping[str, torch.Size]


@dataclass(frozen=True, eq=False)
class BufferLayout:
    """Which values of a buffer's row are which tensor.

    `own[k]`: the shapes of client k's tensors; `shapes`: the largest over the clients, placed by `places` in blocks
    that begin at `starts`, the last of which is P. `kind`: the widest type, and the device.
    """

    own: Sequence[Shapes]
    shapes: Shapes
    places: TreeLayout
    starts: Sequence[int]
    kind: tuple[torch.dtype, torch.device]

    @staticmethod
    def of(trees: Sequence[Tree]) -> BufferLayout:
        """The layout of K trees with the same names."""
        first = trees[0]
        tensors = first.blocks if isinstance(first, FlatTree) else list(first.values())
        dtypes = {tensor.dtype for tensor in tensors} or {torch.float32}
        kind = reduce(torch.promote_types, dtypes), (tensors or [torch.zeros(0)])[0].device
        if len(dtypes) == 1 and isinstance(first, FlatTree) and all(first.alike(other) for other in trees):
            shapes = first.layout.shapes
            return BufferLayout([shapes] * len(trees), shapes, first.layout, _edges(map(len, first.blocks)), kind)
        own = [{name: leaf.shape for name, leaf in params.items()} for params in trees]
        shapes = {name: torch.Size(map(max, zip(*(shapes[name] for shapes in own), strict=True))) for name in own[0]}
        places, _, sizes = layout_of({name: (shape, kind) for name, shape in shapes.items()})
        return BufferLayout(own, shapes, places, _edges(sizes), kind)

    def zeros(self, clients: int) -> Tensor:
        """A (K, P) buffer, in memory that this thread has given back if there is such."""
        dtype, device = self.kind
        for buffer in _kept.buffers:
            if (buffer.shape, buffer.dtype, buffer.device) == ((clients, self.starts[-1]), dtype, device):
                _kept.buffers = tuple(other for other in _kept.buffers if other is not buffer)
                return buffer.zero_()
        return torch.zeros(clients, self.starts[-1], dtype=dtype, device=device)

    def filled(self, trees: Sequence[Tree]) -> Tensor:
        """A (K, P) buffer that holds K trees, zeros elsewhere."""
        buffer = self.zeros(len(trees))
        for k, params in enumerate(trees):
            if self._placed(params):
                for mine, theirs in zip(self._blocks(buffer[k]), params.blocks, strict=True):
                    mine.copy_(theirs)
            else:
                copy_into(self.client(buffer[k], k), params)
        return buffer

    def moved(self, row: Tensor, k: int, start: Tree) -> Tree:
        """Client k's (P,) row minus its start, in its own shapes."""
        if not self._placed(start):
            return tree.sub(self.client(row, k), start)
        return FlatTree(
            [mine - theirs for mine, theirs in zip(self._blocks(row), start.blocks, strict=True)], self.places
        )

    def stacked(self, buffer: Tensor) -> Tree:
        """Views (K, *shape) of a (K, P) buffer."""
        clients, row, first = len(buffer), buffer.stride(0), buffer.storage_offset()
        return {
            name: buffer.as_strided((clients, *shape), (row, *strides), first + self.starts[block] + at)
            for name, (block, shape, strides, at) in self.places.items()
        }

    def client(self, row: Tensor, k: int) -> Tree:
        """Views of client k's (P,) row, in its own shapes."""
        whole = FlatTree(self._blocks(row), self.places)
        if self.own[k] == self.shapes:
            return whole
        return {name: leaf[tuple(map(slice, self.own[k][name]))] for name, leaf in whole.items()}

    def _blocks(self, row: Tensor) -> list[Tensor]:
        return [row[start:end] for start, end in pairwise(self.starts)]

    def _placed(self, params: Tree) -> TypeGuard[FlatTree]:
        """Whether its tensors lie in blocks as the row's do, so that no view of a tensor is needed."""
        same = isinstance(params, FlatTree) and (params.layout is self.places or params.layout == self.places)
        return same and all((block.dtype, block.device) == self.kind for block in params.blocks)  # type: ignore[attr-defined]


def keep_buffers() -> None:
    """From now on this thread keeps the buffers of a stack for its next one, to its end."""
    _kept.keeps = True


def give_back(*buffers: Tensor) -> None:
    """Nobody uses these buffers any more. A thread that keeps such does, in place of those that it has.

    Only those on a CPU that `allocator.retain_freed_memory` does not keep: each page that malloc maps anew costs a
    fault.
    """
    if _kept.keeps:
        _kept.buffers = tuple(each for each in buffers if each.device.type == "cpu" and each.nbytes > LARGEST)


class _Kept(threading.local):
    keeps: bool = False
    buffers: tuple[Tensor, ...] = ()


_kept = _Kept()


def _edges(sizes: Iterable[int]) -> list[int]:
    return [0, *accumulate(sizes)]


LARGEST = 32 << 20  # bytes; glibc refuses a larger threshold
