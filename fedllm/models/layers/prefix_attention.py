"""Prefixes of a pass in the attention of a packed row: each sequence's keys and values behind those of its client.

The queries in front of a sequence are zeros whose outputs are dropped, so that every kernel of plain causal attention
serves: whoever stands behind the prefix sees all of it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fedllm.models.layers.forward_context import Forward


def leaf_name(layer: int, part: str) -> str:
    """The tensor of a layer's keys or values."""
    return f"prefix.{layer}.{part}"


def prefixed(
    now: Forward, layer: int, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]] | None:
    """(heads, T, d) queries and (key heads, T, d) keys and values of a row with prefixes, and the sequences' lengths.

    None where the pass has no prefix.
    """
    found = now.stack.get(leaf_name(layer, "key"))
    if found is None or now.lengths is None:
        return None
    size, owners = found.shape[1], list(_owners(now))
    fronts = [now.stack[leaf_name(layer, part)].to(key.dtype) for part in ("key", "value")]
    rows = [front.unflatten(2, (len(key), -1)).transpose(1, 2) for front in fronts]  # (K, key heads, size, d)
    empty = query.new_zeros(len(query), size, query.shape[2])
    with_front = (
        torch.cat(
            [
                part
                for owner, piece in zip(owners, states.split(list(now.lengths), 1), strict=True)
                for part in (front(owner), piece)
            ],
            1,
        )
        for states, front in ((query, lambda _: empty), (key, rows[0].__getitem__), (value, rows[1].__getitem__))
    )
    q, k, v = with_front
    return q, k, v, tuple(size + length for length in now.lengths)


def without_front(out: Tensor, lengths: tuple[int, ...], size: int) -> Tensor:
    """(T, ...) of the sequences alone, from what attention gives for `lengths` with `size` rows in front of each."""
    return torch.cat([piece[size:] for piece in out.split(list(lengths))])


def _owners(now: Forward) -> Iterator[int]:
    """The client of each sequence."""
    assert now.lengths is not None
    client, left = -1, 0
    for length in now.lengths:
        while left == 0:
            client += 1
            left = now.client_tokens[client] if now.client_tokens else sum(now.lengths)
        left -= length
        yield client
