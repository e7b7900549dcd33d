"""An update of integers as one vector of a ring, and back: what a secure sum masks and what it brings.

The entries stand in the order of the layout, which says of each tensor its part, name, type and shape. All clients of a
round have the same one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from fedllm.errors import WireError
from fedllm.messages.update import Part, Update
from fedllm.privacy.secure_aggregation.rings import Vector, dtype_of

TYPES = {"int16": torch.int16, "int32": torch.int32}
MOST_BYTES = 1 << 24  # of a layout's text
MOST_AXES = 64

Made = TypeVar("Made")


@dataclass(frozen=True)
class Entry:
    """One tensor of the vector."""

    part: str
    leaf: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class VectorLayout:
    """What each entry of a vector stands for."""

    entries: tuple[Entry, ...]

    @staticmethod
    def of(update: Update) -> VectorLayout:
        """Of an update whose tensors are integers."""
        found = [
            Entry(part, leaf, str(held.tree[leaf].dtype).removeprefix("torch."), tuple(held.tree[leaf].shape))
            for part, held in sorted(update.parts.items())
            for leaf in sorted(held.tree)
        ]
        return VectorLayout(tuple(found))

    @property
    def length(self) -> int:
        """Entries of the vector."""
        return sum(math.prod(entry.shape) for entry in self.entries)

    def to_bytes(self) -> bytes:
        """As it is sent and hashed."""
        listed = [[entry.part, entry.leaf, entry.dtype, list(entry.shape)] for entry in self.entries]
        return json.dumps(listed, separators=(",", ":")).encode()

    @staticmethod
    def read(data: bytes) -> VectorLayout:
        """From its bytes.

        Raises:
            WireError: they are no layout.
        """
        return VectorLayout(read_entries(data, _entry))

    def vector(self, update: Update, bits: int) -> Vector:
        """The update's integers modulo 2^bits."""
        pieces = [update.parts[e.part].tree[e.leaf].reshape(-1).numpy() for e in self.entries]
        joined = np.concatenate(pieces).astype("<i2" if bits == 16 else "<i4", copy=False).view(dtype_of(bits))
        return np.bitwise_and(joined, np.uint32((1 << bits) - 1)) if bits == 20 else joined

    def update(self, total: Vector) -> Update:
        """The sum of the vectors, in signed integers, as an update."""
        flat = torch.from_numpy(np.ascontiguousarray(total))
        parts: dict[str, Part] = {}
        at = 0
        for entry in self.entries:
            size = math.prod(entry.shape)
            leaf = flat[at : at + size].reshape(entry.shape).to(TYPES[entry.dtype])
            parts.setdefault(entry.part, Part({}, 0.0)).tree[entry.leaf] = leaf
            at += size
        return Update(parts)


def read_entries(data: bytes, make: Callable[..., Made]) -> tuple[Made, ...]:
    """The entries of a layout from its bytes, each made of its values.

    Raises:
        WireError: they are no layout.
    """
    try:
        if len(data) > MOST_BYTES:
            raise ValueError(f"{len(data):,} bytes")
        return tuple(make(*listed) for listed in json.loads(data))
    except (ValueError, TypeError, RecursionError) as error:
        raise WireError(f"the layout of a vector could not be read: {str(error)[:200]}") from error


def require_entry(entry: Sequence[object], types: Collection[str]) -> None:
    """
    Raises:
        ValueError: part, tensor, type and shape are none, or the type is another one.
    """
    part, leaf, dtype, shape = entry
    named = isinstance(part, str) and isinstance(leaf, str) and isinstance(dtype, str) and dtype in types
    sizes = isinstance(shape, list) and all(type(size) is int and 0 <= size < 1 << 40 for size in shape)
    if not (named and sizes and len(shape) <= MOST_AXES):  # type: ignore[arg-type]  # a list, as `sizes` says
        raise ValueError(f"an entry is {list(entry)!r}"[:200])


def _entry(part: str, leaf: str, dtype: str, shape: Sequence[int]) -> Entry:
    require_entry((part, leaf, dtype, shape), TYPES)
    return Entry(part, leaf, dtype, tuple(shape))
