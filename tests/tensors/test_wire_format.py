"""Packings: codes, scales and bytes, by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedllm.tensors import wire_format
from fedllm.tensors.wire_format import DENSE, SPARSE, WireFormat

BITS = (8, 4, 1)


def test_defaults() -> None:
    assert WireFormat() == DENSE and not DENSE.sparse and DENSE.bits is None
    assert SPARSE.sparse and SPARSE.bits is None


@pytest.mark.parametrize(("bits", "top"), [(1, 1), (4, 7), (8, 127)])
def test_levels(bits: int, top: int) -> None:
    assert wire_format.levels(bits) == top


def test_blocks_fill_up_the_tail() -> None:
    leaf = torch.arange(1, 6).reshape(5, 1)
    assert wire_format.quantization_blocks(leaf, 2).tolist() == [[1, 2], [3, 4], [5, 0]]
    assert wire_format.quantization_blocks(leaf, 5).tolist() == [[1, 2, 3, 4, 5]]
    assert wire_format.quantization_blocks(torch.tensor(7.0), 3).tolist() == [[7, 0, 0]]
    assert wire_format.quantization_blocks(torch.zeros(0, 4), 3).shape == (0, 3)


def test_squeezed_bytes_by_hand() -> None:
    assert wire_format.pack_bits(torch.tensor([-127, 0, 5], dtype=torch.int8), 8).tolist() == [-127, 0, 5]
    # two's complement in four bits, the first code in the low half: -7 = 9, -1 = 15
    assert wire_format.pack_bits(torch.tensor([-7, 7, -1], dtype=torch.int8), 4).tolist() == [0x79, 0x0F]
    # a bit for each code, the first one lowest
    assert wire_format.pack_bits(torch.tensor([1, -1, 1, 1, -1, -1, -1, 1, 1], dtype=torch.int8), 1).tolist() == [
        0x8D,
        0x01,
    ]


@pytest.mark.parametrize("bits", BITS)
@given(data=st.data())
def test_unsqueeze_inverts_squeeze(bits: int, data: st.DataObject) -> None:
    top = wire_format.levels(bits)
    allowed = st.sampled_from([-1, 1]) if bits == 1 else st.integers(-top, top)
    codes = torch.tensor(data.draw(st.lists(allowed, max_size=40)), dtype=torch.int8)
    squeezed = wire_format.pack_bits(codes, bits)
    assert squeezed.numel() * squeezed.element_size() == -(-codes.numel() * bits // 8)
    found = wire_format.unpack_bits(squeezed, bits, codes.numel())
    assert found.dtype == torch.int8 and torch.equal(found, codes)


@st.composite
def on_grid(draw: st.DrawFn, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """Codes, scales, the leaf that they make, bits and block. Some blocks have scale 0."""
    bits, block = draw(st.sampled_from(BITS)), draw(st.integers(1, 9))
    shape = torch.Size(draw(st.lists(st.integers(0, 5), max_size=3)))
    rows = -(-shape.numel() // block)
    sizes = st.one_of(st.just(0.0), st.floats(2.0**-140, 2.0**100, width=32))
    scales = torch.tensor(draw(st.lists(sizes, min_size=rows, max_size=rows)), dtype=dtype)
    top = wire_format.levels(bits)
    drawn = st.sampled_from([-1, 1]) if bits == 1 else st.integers(-top, top)
    codes = torch.tensor(draw(st.lists(drawn, min_size=rows * block, max_size=rows * block)), dtype=torch.int8)
    codes = codes.reshape(rows, block)
    return codes, scales, wire_format.values(codes, scales, shape), bits, block


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(data=st.data())
def test_codes_of_values_on_the_grid_are_exact(dtype: torch.dtype, data: st.DataObject) -> None:
    codes, scales, leaf, _, block = data.draw(on_grid(dtype))
    assert leaf.dtype == dtype
    found = wire_format.codes(leaf, scales, block)
    expected = codes * (scales != 0)[:, None]  # a block of scale 0 holds zeros
    expected.reshape(-1)[leaf.numel() :] = 0  # and so does the tail
    assert torch.equal(found, expected)
    again = wire_format.values(found, scales, leaf.shape)
    assert torch.equal(again, leaf)
    assert not bool((torch.signbit(again) & (again == 0)).any())  # no -0


def test_values_by_hand() -> None:
    codes = torch.tensor([[-7, 0, 3], [1, -1, 1]], dtype=torch.int8)
    leaf = wire_format.values(codes, torch.tensor([0.5, 0.0]), torch.Size([5, 1]))
    assert leaf.tolist() == [[-3.5], [0.0], [1.5], [0.0], [0.0]]
    assert not bool(torch.signbit(leaf[3:]).any())
