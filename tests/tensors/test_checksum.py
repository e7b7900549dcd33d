"""A checksum sees every bit of a tree, however large its tensors are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedllm.tensors.checksum import LARGE, checksum

MANY = LARGE // 2 + 37  # of 16 bits: large, with bytes that fill no row and no word


def numbers(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("count", [0, 1, 100, MANY])
def test_any_bit_shows(count: int) -> None:
    whole = checksum({"w": numbers(count)})
    for place in {0, 1, count // 2, count - 2, count - 1} & set(range(count)):
        for bit in (0, 7, 14):
            other = numbers(count).view(torch.int16).clone()
            other[place] ^= 1 << bit
            assert checksum({"w": other.view(torch.bfloat16)}) != whole, (place, bit)


def test_rows_that_change_places_show() -> None:
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    other = weight.clone()
    other[[3, 4]] = weight[[4, 3]]
    assert checksum({"w": weight}) != checksum({"w": other})


def test_names_types_and_shapes_count_and_the_memory_does_not() -> None:
    weight = torch.randn(600, 512, generator=torch.Generator().manual_seed(0))
    whole = checksum({"a": weight, "b": torch.ones(3)})
    assert checksum({"b": torch.ones(3), "a": weight.T.contiguous().T}) == whole
    shifted = torch.cat([torch.zeros(1), weight.reshape(-1)])[1:].view(600, 512)  # begins within a word
    assert checksum({"a": shifted, "b": torch.ones(3)}) == whole
    assert checksum({"a": weight, "c": torch.ones(3)}) != whole
    assert checksum({"a": weight.view(512, 600), "b": torch.ones(3)}) != whole
    assert checksum({"a": weight.view(torch.int32), "b": torch.ones(3)}) != whole
