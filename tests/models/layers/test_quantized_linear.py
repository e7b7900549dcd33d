"""Matrices in few bits: a block by hand, bounds, and products and gradients of the dense matrix that they stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedllm.models.layers import quantized_linear as module
from fedllm.models.layers.quantized_linear import BLOCK, Quantized, QuantizedEmbedding, QuantizedLinear, num_parameters

every = pytest.mark.parametrize("bits", [8, 4])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_block_by_hand() -> None:
    """Smallest -1, largest 2, 4 bits: steps of 0.2. 0.31 lies between 0.2 and 0.4, and goes to 0.4."""
    made = Quantized.of(torch.tensor([[-1.0, 2.0, 0.31, 0.0]]), 4)
    assert made.scale.tolist() == [[pytest.approx(0.2)]] and made.low.tolist() == [[-1.0]]
    assert made.dense().tolist() == [[-1.0, pytest.approx(2.0), pytest.approx(0.4), pytest.approx(0.0, abs=1e-6)]]
    codes = made.codes[0].tolist()  # the first half of a block in the low bits, the last value fills it up
    assert codes[:5] == [0 | 5 << 4, 15 | 5 << 4, 7 | 5 << 4, 5 | 5 << 4, 5 | 5 << 4] and len(codes) == BLOCK // 2


@every
@given(
    rows=st.integers(1, 3), columns=st.integers(1, 200), seed=st.integers(0, 99), size=st.sampled_from([1e-6, 1.0, 1e4])
)
def test_no_value_is_off_by_more_than_half_a_step_of_its_block(
    bits: int, rows: int, columns: int, seed: int, size: float
) -> None:
    weight = (size * drawn(rows, columns, seed=seed)).float().double()
    made = Quantized.of(weight, bits)
    off = (made.rows(slice(None), torch.float64) - weight).abs()
    steps = made.scale.double().repeat_interleave(BLOCK, 1)[:, :columns]
    assert bool((off <= 0.5 * steps * (1 + 1e-3)).all())
    for at in range(0, columns, BLOCK):
        block = weight[:, at : at + BLOCK]
        step = (block.amax(1) - block.amin(1)) / (2**bits - 1)
        assert torch.allclose(made.scale[:, at // BLOCK].double(), step, rtol=1e-5, atol=0)
    assert torch.equal(
        made.rows(torch.tensor([rows - 1]), torch.float64), made.rows(slice(rows - 1, None), torch.float64)
    )


@every
def test_a_block_of_one_value_is_exact(bits: int) -> None:
    assert torch.equal(Quantized.of(torch.full((2, 70), 0.3), bits).dense(), torch.full((2, 70), 0.3))


def test_four_bits_are_further_off_than_eight() -> None:
    weight = drawn(32, 256)
    eight, four = (float((Quantized.of(weight, bits).dense() - weight).norm()) for bits in (8, 4))
    assert four > 10 * eight > 0


@pytest.mark.parametrize(("bits", "bits_a_value"), [(8, 9), (4, 5)])
def test_bytes(bits: int, bits_a_value: int) -> None:
    made = Quantized.of(drawn(10, 4 * BLOCK).float(), bits)
    assert 8 * (made.codes.nbytes + made.scale.nbytes + made.low.nbytes) == bits_a_value * 10 * 4 * BLOCK


@every
@pytest.mark.parametrize("chunk", [1, 150, 1 << 19])  # a row, two rows, all
@pytest.mark.parametrize("biased", [False, True])
def test_values_and_gradients_are_those_of_the_dense_matrix(
    bits: int, chunk: int, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    bias = nn.Parameter(drawn(5, seed=1), requires_grad=False) if biased else None
    layer = QuantizedLinear(Quantized.of(drawn(5, 70), bits), bias)  # not square, and a block that is not full
    x, gradient = drawn(2, 3, 70, seed=2).requires_grad_(), drawn(2, 3, 5, seed=3)
    dense = layer.weight
    assert dense.dtype == torch.float64 and dense.shape == (5, 70) == (layer.out_features, layer.in_features)
    expected = nn.functional.linear(x, dense, bias)
    (theirs,) = torch.autograd.grad(expected, x, gradient)
    found = layer(x)
    (mine,) = torch.autograd.grad(found, x, gradient)
    assert torch.allclose(found, expected, atol=1e-12) and torch.allclose(mine, theirs, atol=1e-12)


@every
def test_no_dense_weight_is_kept_for_the_gradient(bits: int) -> None:
    layer, kept = QuantizedLinear(Quantized.of(drawn(500, 300).float(), bits), None), list[Tensor]()

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(torch.ones(2, 300, requires_grad=True))
    assert sum(tensor.numel() for tensor in kept) <= 600


@every
def test_an_embedding_makes_the_rows_of_its_tokens(bits: int) -> None:
    layer = QuantizedEmbedding(Quantized.of(drawn(9, 70), bits), None)
    tokens = torch.tensor([[3, 3, 0], [8, 1, 3]])
    assert torch.equal(layer(tokens), layer.weight[tokens])


def test_a_matrix_that_is_shared_counts_once() -> None:
    matrix = Quantized.of(drawn(9, 70), 8)
    model = nn.ModuleList([QuantizedEmbedding(matrix, None), QuantizedLinear(matrix, None), nn.LayerNorm(70)])
    assert num_parameters(model) == 9 * 70 + 2 * 70
