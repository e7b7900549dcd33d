"""The leaves of K clients in one buffer: an optimiser step, a norm or a difference is one operation a client.

    buffer (K, P)        leaf n of the stack: buffer[:, at : at + size] as (K, *shape)

Clients whose leaves differ in size (ranks of a low-rank adapter) are padded with zeros to the largest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedllm.tree import Tree

Shapes = dict[str, torch.Size]


@dataclass(frozen=True, eq=False)
class Layout:
    """Which values of a buffer's row are which leaf. `own[k]` are the shapes of client k's leaves, `shapes` the
    largest over the clients."""

    own: Sequence[Shapes]
    shapes: Shapes

    @staticmethod
    def of(trees: Sequence[Tree]) -> Layout:
        """The layout of K trees with the same names."""
        own = [{name: leaf.shape for name, leaf in params.items()} for params in trees]
        shapes = {name: torch.Size(map(max, zip(*(shapes[name] for shapes in own), strict=True))) for name in own[0]}
        return Layout(own, shapes)

    @property
    def size(self) -> int:
        """P: values of a row."""
        return sum(shape.numel() for shape in self.shapes.values())

    def stacked(self, buffer: Tensor) -> Tree:
        """Views (K, *shape) of a (K, P) buffer."""
        return {name: piece.view(-1, *self.shapes[name]) for name, piece in self._pieces(buffer)}

    def client(self, row: Tensor, k: int) -> Tree:
        """Views of client k's (P,) row, in its own shapes."""
        own = self.own[k]
        if own == self.shapes:
            return {name: piece.view(own[name]) for name, piece in self._pieces(row)}
        whole = {name: piece.view(self.shapes[name]) for name, piece in self._pieces(row)}
        return {name: leaf[tuple(map(slice, own[name]))] for name, leaf in whole.items()}

    def _pieces(self, buffer: Tensor) -> Iterator[tuple[str, Tensor]]:
        sizes = [shape.numel() for shape in self.shapes.values()]
        return zip(self.shapes, buffer.split(sizes, -1), strict=True)


def filled(layout: Layout, trees: Sequence[Tree]) -> Tensor:
    """A (K, P) buffer that holds K trees, zeros elsewhere, in the widest of their types."""
    leaves = list(trees[0].values())
    dtype = leaves[0].dtype if leaves else torch.float32
    for leaf in leaves:
        dtype = torch.promote_types(dtype, leaf.dtype)
    buffer = torch.zeros(len(trees), layout.size, dtype=dtype, device=leaves[0].device if leaves else None)
    for k, params in enumerate(trees):
        for name, view in layout.client(buffer[k], k).items():
            view.copy_(params[name])
    return buffer
