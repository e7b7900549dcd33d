"""A checksum of many tensors at the speed of memory; SHA-256 takes five times as long or more.

Of a tensor of 64 KiB or more the 64-bit words are added up, mod 2^64, in rows of 64, and the sums are hashed; of a
smaller one the values are. It tells models apart that differ in training, not those that somebody made to look alike:
words that change places within a row do not show.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

WORD, ROW = 8, 64  # bytes, words
LARGE = 1 << 16  # bytes


def checksum(tree: Mapping[str, Tensor]) -> str:
    """Of names, dtypes, shapes and values; the order of the leaves does not matter. It takes one thread: memory is
    the limit, and several would wait for each other on a busy machine."""
    state, threads = hashlib.sha256(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in sorted(tree):
            leaf = tree[name].detach()
            state.update(repr((name, str(leaf.dtype), tuple(leaf.shape))).encode())
            for part in _hashed(leaf.contiguous().reshape(-1).view(torch.uint8)):
                state.update(part.cpu().contiguous().view(torch.uint8).numpy().data)
    finally:
        torch.set_num_threads(threads)
    return state.hexdigest()


def _hashed(values: Tensor) -> Iterator[Tensor]:
    """Sums of a large tensor's rows, and the bytes that are in none."""
    end = len(values) // (WORD * ROW) * WORD * ROW if len(values) >= LARGE else 0
    if end:
        rows = values[:end] if values.storage_offset() % WORD == 0 else values[:end].clone()
        yield rows.view(torch.int64).view(-1, ROW).sum(1)
    yield values[end:]
