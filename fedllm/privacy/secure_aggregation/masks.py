"""Masks: keystreams that are added to a vector, or taken off it, in place.

The keystream of a key is read as entries of the vector's type: uniform over the ring, whose 2^bits divides 2^16 or
2^32.
A block of the vector stays in the processor's cache while all masks are added to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from fedllm.privacy.secure_aggregation.primitives import keystream
from fedllm.privacy.secure_aggregation.rings import Vector

BLOCK = 256 * 1024  # bytes of keystream at a time, a multiple of 64
ZEROS = bytes(BLOCK)
SLACK = 16  # bytes that `update_into` wants beyond its output


@dataclass(frozen=True)
class Mask:
    """A key whose keystream is added, or subtracted."""

    key: bytes
    add: bool = True


def apply_masks(vector: Vector, masks: Sequence[Mask], cipher: str, threads: int = 1, first: int = 0) -> None:
    """Add masks to a vector in place, modulo 2^16 or 2^32 by its type.

    vector: contiguous uint16 or uint32.
    threads: how many share the work; the result is the same.
    first: the byte of the keystreams that the vector begins at, a multiple of 64.
    """
    blocks = -(-vector.nbytes // BLOCK)
    per_thread = -(-blocks // threads) * BLOCK // vector.itemsize
    parts = [(start, vector[start : start + per_thread]) for start in range(0, len(vector), max(per_thread, 1))]
    if len(parts) <= 1:
        for start, part in parts:
            _apply(part, masks, cipher, first + start * vector.itemsize)
        return
    with ThreadPoolExecutor(len(parts)) as pool:
        size = vector.itemsize
        for done in [pool.submit(_apply, part, masks, cipher, first + start * size) for start, part in parts]:
            done.result()


def apply_to_check(check: Vector, masks: Sequence[Mask], cipher: str, entries: int) -> None:
    """Add masks to the check that follows a vector of `entries`, by keystream that no entry of the vector has met."""
    apply_masks(check, masks, cipher, first=-(-entries * check.itemsize // 64) * 64)


def _apply(part: Vector, masks: Sequence[Mask], cipher: str, first: int) -> None:
    """`apply_masks` on a part that begins at byte `first` of the vector."""
    streams = [(keystream(cipher, mask.key, first).update_into, np.add if mask.add else np.subtract) for mask in masks]
    stream = np.empty(BLOCK + SLACK, np.uint8)
    zeros, size = memoryview(ZEROS), BLOCK // part.itemsize
    for start in range(0, len(part), size):
        block = part[start : start + size]
        values = stream[: block.nbytes].view(part.dtype)
        for update_into, change in streams:
            update_into(zeros[: block.nbytes], stream.data)
            change(block, values, out=block)
