"""The settings that arithmetic on a grid and accountants can work with, and how a message says so."""

from __future__ import annotations

SMALLEST, LARGEST = 1e-30, 1e30  # of a bound: sums of many clients, and steps of a grid, are then ordinary float32
LEAST, MOST = 1e-6, 1e6  # of a noise multiplier
BOUND = f"{SMALLEST:g} to {LARGEST:g}"
NOISE = f"0, or {LEAST:g} to {MOST:g}"


def is_bound(value: float) -> bool:
    """Whether a norm may be bounded by it."""
    return SMALLEST <= value <= LARGEST


def is_noise(value: float) -> bool:
    """Whether it may be a noise multiplier."""
    return value == 0 or LEAST <= value <= MOST
