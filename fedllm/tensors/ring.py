"""Integers whose sums do not wrap: stochastic rounding, numbers as digits, and a rotation that spreads values evenly.

A sum of n integers of at most (2^(m-1) - 1) / n each is exact modulo 2^m. Whatever needs more bits than that leaves for
one client is written in digits, each of which is added up by itself.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GRID_BITS = {torch.float32: 24, torch.float64: 52}  # of a sum on the grid of a bounded norm, at most
WIDTH = 61  # bits of the size of a number in digits: sums are put together in int64


def largest(bits: int) -> int:
    """The largest number of the ring 2^bits, whose numbers are read as signed."""
    return (1 << (bits - 1)) - 1


def digit_bits(bits: int, clients: int) -> int:
    """The largest b with clients (2^b - 1) <= 2^(bits-1) - 1: bits of a digit that as many clients may add up."""
    return (largest(bits) // max(1, clients) + 1).bit_length() - 1


def to_digits(values: Tensor, base: int, count: int) -> Tensor:
    """Int64 values (...) as `count` digits (count, ...), the lowest first: v = sum_i digit_i 2^(base i).

    All but the last lie in 0 .. 2^base - 1. The last has the sign, and lies in -2^(base-1) .. 2^(base-1) if
    |v| <= 2^(base count - 1).
    """
    low = [(values >> (base * place)) & ((1 << base) - 1) for place in range(count - 1)]
    return torch.stack([*low, values >> (base * (count - 1))])


def from_digits(digits: Tensor, base: int) -> Tensor:
    """Sums of digits (count, ...) to sums of values (...) in int64: right as long as these fit into 63 bits."""
    total = torch.zeros_like(digits[0], dtype=torch.int64)
    for place in range(len(digits)):
        total += digits[place].to(torch.int64) << (base * place)
    return total


def stochastic_round(values: Tensor, generator: torch.Generator) -> Tensor:
    """floor(x + u) with u uniform in [0, 1): the integer below or above, x on average; integers stay as they are."""
    draws = torch.rand(values.shape, generator=generator, dtype=torch.float64)
    below = values.floor()
    return (below + (draws < values - below)).to(torch.int64)


def rotated(values: Tensor, generator: torch.Generator, *, back: bool = False) -> Tensor:
    """y = H D x / sqrt(d), and x of y with `back`; (d,) float64, d a power of two.

    H is the Hadamard matrix and D a random diagonal of +1 and -1. Keeps lengths; whatever x is, an entry of y is about
    as large as ||x|| / sqrt(d). Ailon and Chazelle 2009, 10.1137/060673096; Suresh et al. 2017, arXiv 1611.00429.
    """
    signs = 2.0 * torch.randint(2, values.shape, generator=generator, dtype=torch.int64).double() - 1
    found = (values if back else values * signs).reshape(1, -1)
    while found.shape[1] > 1:  # (rows, width) -> (2 rows, width / 2): sums and differences of the two halves
        left, right = found.chunk(2, dim=1)
        found = torch.stack([left + right, left - right], dim=1).reshape(-1, left.shape[1])
    found = found.reshape(-1) / math.sqrt(values.numel())
    return found * signs if back else found


def power_above(count: int) -> int:
    """The smallest power of two that is at least `count`."""
    return 1 << max(0, count - 1).bit_length()
