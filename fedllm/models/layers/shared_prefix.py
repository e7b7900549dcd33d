"""What the sequences of a client begin with in common stands once in the row that is computed.

    row of T tokens           | first sequence | common, own | common, own | ...       of one client
    computed row of C tokens  | first sequence |         own |         own | ...

Attention is causal, so that the common tokens have the same states in every sequence; their gradients add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SharedPrefix:
    """`kept` (C,): which tokens are computed; `places` (T,): where each token of the row stands among them."""

    kept: Tensor
    places: Tensor


@lru_cache(maxsize=64)
def shared_prefix(lengths: tuple[int, ...], shared: tuple[int, ...], device: str = "cpu") -> SharedPrefix:
    """Sequences of these lengths, `shared[i]` of whose first tokens are those of the nearest one before without any."""
    starts, firsts = [0, *accumulate(lengths)], first_of(shared)
    owners = [
        torch.arange(length) + torch.where(torch.arange(length) < shared[i], starts[firsts[i]], starts[i])
        for i, length in enumerate(lengths)
    ]
    owner = torch.cat(owners)
    kept = (owner == torch.arange(len(owner))).nonzero()[:, 0]
    return SharedPrefix(kept.to(device), torch.searchsorted(kept, owner).to(device))


def first_of(shared: Sequence[int]) -> list[int]:
    """For each sequence, the one whose first tokens it shares: itself where it shares none."""
    return list(accumulate((i if not common else 0 for i, common in enumerate(shared)), max))
