"""Held-out records: a part of each client's own that it never trains on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch

from fedllm.errors import ConfigError
from fedllm.rng import Key

Record = TypeVar("Record")


def hold_out(records: Sequence[Record], *, fraction: float | None, key: Key) -> tuple[list[Record], list[Record]]:
    """One client's records as (to train on, held out), both in their own order.

    round(fraction * n) records, halves up, are drawn by the key; at least one is left to train on. None: none.

    Raises:
        ConfigError: `fraction` is not in [0, 1).
    """
    if fraction is None:
        return list(records), []
    if not 0 <= fraction < 1:
        raise ConfigError(f"the held-out fraction is {fraction}; it must be 0 or more and below 1")
    count = min(int(fraction * len(records) + 0.5), max(0, len(records) - 1))
    drawn = set(torch.randperm(len(records), generator=key.generator())[:count].tolist())
    train = [record for row, record in enumerate(records) if row not in drawn]
    return train, [record for row, record in enumerate(records) if row in drawn]
