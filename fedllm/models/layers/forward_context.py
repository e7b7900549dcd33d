"""What the wrapped layers of this thread compute with right now.

A layer of the shared base model cannot be handed an adapter as an argument, and swapping its parameters is not safe
between threads; it reads the adapters and the layout of its own thread here.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Forward:
    """One forward pass. `stack` tensors are (K, ...). `lengths` None: an ordinary padded batch of one client (K = 1);
    else one row of sequences, `client_tokens[k]` of its tokens client k's. `shared`: as in a batch; those tokens of
    the sequences are not in the row. `wanted`: tokens of the row whose last states somebody needs, in order; None: all.
    `dropout`: a generator per client, or none. `recompute`: keep the inputs of the layers only."""

    stack: Mapping[str, Tensor]
    lengths: tuple[int, ...] | None = None
    client_tokens: tuple[int, ...] = ()
    shared: tuple[int, ...] = ()
    wanted: Tensor | None = None
    dropout: tuple[torch.Generator, ...] = ()
    recompute: bool = False


_IDLE = Forward({})


class _Local(threading.local):
    forward: Forward = _IDLE


_local = _Local()


def current() -> Forward:
    """The forward pass of this thread; outside of one, a pass without adapters."""
    return _local.forward


@contextmanager
def forward_context(forward: Forward) -> Iterator[None]:
    """Make `forward` this thread's pass."""
    before, _local.forward = _local.forward, forward
    try:
        yield
    finally:
        _local.forward = before
