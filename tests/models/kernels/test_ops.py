"""The kernels against their formulas in float64, for shapes that fill no vector and no block."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedllm.models.kernels import ctypes_calls, matmul, ops
from fedllm.models.kernels.matmul import Matrix, MatrixLayout
from tests.needs import needs_kernels, needs_tiles

pytestmark = needs_kernels
Row = tuple[int, int, int, int]
ROUNDING = 2.0**-8  # of a number of 16 bits: half a unit of its last place


def drawn(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul(scale).bfloat16()


def near(found: Tensor, exact: Tensor, times: float = 1.0, more: Tensor | float = 0.0) -> bool:
    """Within `times` the rounding of 16 bits, for values that cancel relative to the largest, and `more`."""
    error = (found.double() - exact.double()).abs()
    return bool((error <= times * ROUNDING * exact.abs().clamp(min=float(exact.abs().max()) / 64) + more).all())


@given(rows=st.integers(1, 5), size=st.integers(1, 70), scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_norms(rows: int, size: int, scale: float) -> None:
    x, dy, weight = drawn(rows, size, seed=0, scale=scale), drawn(rows, size, seed=1), drawn(size, seed=2)
    y, r = ops.norm(x, weight, 1e-5)
    gradient = ops.norm_backward(dy, x, weight, r)
    wide = x.double().requires_grad_()
    exact = weight.double() * wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    (expected,) = torch.autograd.grad(exact, wide, dy.double())
    assert near(y, exact.detach(), 2.1)  # rounded twice, as in transformers
    assert torch.allclose(gradient.double(), expected, rtol=ROUNDING, atol=1e-5 * float(dy.double().norm()) / scale)


@given(size=st.integers(1, 70), scale=st.sampled_from([1e-2, 1.0, 30.0]))
def test_gated_products(size: int, scale: float) -> None:
    gate, up, dy = (drawn(3, size, seed=seed, scale=scale) for seed in (0, 1, 2))
    wide = [gate.double().requires_grad_(), up.double().requires_grad_()]
    exact = torch.nn.functional.silu(wide[0]) * wide[1]
    expected = torch.autograd.grad(exact, wide, dy.double())
    assert torch.allclose(ops.gated(gate, up).double(), exact, rtol=2.1 * ROUNDING, atol=1e-30)
    for found, gradient in zip(ops.gated_backward(dy, gate, up), expected, strict=True):
        assert torch.allclose(found.double(), gradient, rtol=2.1 * ROUNDING, atol=1e-6 * scale * scale)


@given(positions=st.integers(1, 5), heads=st.integers(1, 3), half=st.sampled_from([1, 5, 16, 32]))
def test_rotary_embeddings(positions: int, heads: int, half: int) -> None:
    x, dy = (drawn(heads, positions, 2 * half, seed=seed).transpose(0, 1) for seed in (0, 1))
    angles = drawn(positions, 2 * half, seed=2, scale=3).float()
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()

    def turned(x: Tensor) -> Tensor:
        one, two = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat([-two, one], -1) * sin[:, None]

    assert torch.equal(ops.rotary(x, cos, sin), turned(x))
    wide = x.double().requires_grad_()
    (expected,) = torch.autograd.grad(turned(wide), wide, dy.double())
    assert torch.allclose(ops.rotary_backward(dy, cos, sin).double(), expected, rtol=1.1 * ROUNDING, atol=1e-6)


def attended(states: list[Tensor], rows: list[Row], window: int | None, scale: float) -> Tensor:
    """(heads, T, d) queries and (groups, T, .) keys and values to (T, heads, .), sequence by sequence."""
    q, k, v = (x.repeat_interleave(len(states[0]) // len(x), 0) for x in states)
    out = torch.zeros(q.shape[1], len(q), v.shape[2], dtype=q.dtype)
    for first, common, own, length in rows:
        places = torch.cat([first + torch.arange(common), own + torch.arange(length - common)])
        behind = torch.arange(common, length)[:, None] - torch.arange(length)
        hidden = (behind < 0) | (behind >= (window or length))
        scores = (scale * q[:, places[common:]] @ k[:, places].mT).masked_fill(hidden, -math.inf)
        found = (scores.softmax(-1) @ v[:, places]).transpose(0, 1)
        out = out.index_add(0, places[common:], found)
    return out


@needs_tiles
@given(
    rows=st.sampled_from(
        [
            [(0, 0, 0, 1)],
            [(0, 0, 0, 7), (7, 0, 7, 33)],
            [(0, 0, 0, 40), (0, 11, 40, 29), (0, 11, 58, 12)],
            [(0, 0, 0, 16), (16, 0, 16, 65), (16, 9, 81, 17)],
        ]
    ),
    groups=st.integers(1, 2),
    per=st.integers(1, 3),
    sizes=st.sampled_from([(16, 16), (32, 16), (16, 48)]),
    window=st.none() | st.integers(1, 70),
    scale=st.sampled_from([0.125, 1.0]),
)
def test_attention_within_sequences(
    rows: list[Row], groups: int, per: int, sizes: tuple[int, int], window: int | None, scale: float
) -> None:
    sequences = ops.Sequences.of(rows)
    size, size_v = sizes
    shapes = ((groups * per, size), (groups, size), (groups, size_v))
    states = [drawn(sequences.tokens, *shape, seed=i).transpose(0, 1) for i, shape in enumerate(shapes)]
    dout = drawn(sequences.tokens, groups * per, size_v, seed=4)
    q, k, v = states
    out, p = ops.attention((q, k, v), sequences, window, scale)
    found = [out, *ops.attention_backward(dout, (q, k, v, p), sequences, window, scale)]
    wide = [x.double().requires_grad_() for x in states]
    exact = attended(wide, rows, window, scale)
    expected = [exact, *(gradient.transpose(0, 1) for gradient in torch.autograd.grad(exact, wide, dout.double()))]
    for mine, theirs in zip(found, expected, strict=True):
        assert float((mine.double() - theirs).detach().norm()) <= 2.5 * ROUNDING * float(theirs.detach().norm()) + 1e-6


@needs_tiles
def test_attention_of_one_sequence_changes_no_bit_of_another() -> None:
    def passed(spoilt: bool) -> list[Tensor]:
        q, k, v = (drawn(60, 2, 16, seed=i) for i in range(3))
        if spoilt:
            q[20:41], k[20:41], v[20:41] = math.nan, math.inf, 3.0
        sequences = ops.Sequences.of([(0, 0, 0, 20), (20, 0, 20, 21), (41, 0, 41, 19)])
        states = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        out, p = ops.attention(states, sequences, None, 0.25)
        return [out, *ops.attention_backward(drawn(60, 2, 16, seed=3), (*states, p), sequences, None, 0.25)]

    others = [*range(20), *range(41, 60)]
    for one, two in zip(passed(False), passed(True), strict=True):
        assert torch.equal(one[others], two[others]) and two[20:41].isnan().any()


@given(rows=st.integers(1, 4), size=st.integers(2, 100), scale=st.sampled_from([0.1, 5.0, 200.0]))
def test_cross_entropy(rows: int, size: int, scale: float) -> None:
    logits = drawn(rows, size, seed=0, scale=scale)
    targets = torch.arange(rows) * 7 % size
    wide = logits.double().requires_grad_()
    exact = torch.nn.functional.cross_entropy(wide, targets, reduction="none")
    (expected,) = torch.autograd.grad(exact.sum(), wide)
    losses = ops.cross_entropy_(logits, targets)
    assert torch.allclose(losses.double(), exact, rtol=1e-5, atol=1e-5)
    assert torch.allclose(logits.double(), expected, rtol=1.1 * ROUNDING, atol=1e-6)


@given(rows=st.integers(1, 4), size=st.integers(2, 300), scale=st.sampled_from([0.1, 5.0, 200.0]))
def test_probabilities_that_hardly_count_are_zero_and_summed(rows: int, size: int, scale: float) -> None:
    logits = drawn(rows, size, seed=0, scale=scale)
    targets = torch.arange(rows) * 7 % size
    p, whole, others = logits.double().softmax(1), logits.clone(), torch.ones(rows, size, dtype=torch.bool)
    others[torch.arange(rows), targets] = False
    losses = ops.cross_entropy_(whole, targets)
    found, rest = ops.cross_entropy_few_(logits, targets)
    assert torch.equal(found, losses)
    least = (p * others).sum(1, keepdim=True) / 2**18
    assert not logits[(p < 0.999 * least) & others].any()
    kept = (p > 1.001 * least) | ~others
    assert torch.equal(logits[kept], whole[kept])
    expected = (p * ((logits == 0) & others)).sum(1)
    assert torch.allclose(rest.double(), expected, rtol=1e-4, atol=1e-30)


def test_logits_that_are_extreme() -> None:
    values = [3.3e38, -3.3e38, 0.0, -math.inf]
    logits = torch.tensor([values, [0.0, 1.0, math.nan, 2.0]]).bfloat16()
    losses = ops.cross_entropy_(logits, torch.tensor([0, 1]))
    assert losses[0] == 0 and logits[0].tolist() == [0, 0, 0, 0]
    assert losses[1].isnan() and logits[1].isnan().all()
    logits = torch.tensor([values, [0.0, 1.0, math.nan, 2.0]]).bfloat16()
    losses, rest = ops.cross_entropy_few_(logits, torch.tensor([0, 1]))
    assert losses[0] == 0 and rest[0] == 0 and not logits[0].any()
    assert losses[1].isnan() and rest[1].isnan()


@pytest.mark.parametrize("target", [-1, 4])
def test_a_target_that_is_no_word_is_refused_and_nothing_is_written(target: int) -> None:
    logits = drawn(2, 4, seed=0)
    before = logits.clone()
    with pytest.raises(IndexError, match="cross_entropy"):
        ops.cross_entropy_(logits, torch.tensor([1, target]))
    assert torch.equal(logits, before)


def test_one_row_that_is_not_finite_changes_no_other() -> None:
    gate, up = drawn(4, 33, seed=0), drawn(4, 33, seed=1)
    spoilt = gate.clone()
    spoilt[2] = math.nan
    one, two = ops.gated(gate, up), ops.gated(spoilt, up)
    assert torch.equal(one[[0, 1, 3]], two[[0, 1, 3]]) and two[2].isnan().all()
    weight = torch.ones(33).bfloat16()
    one, two = ops.norm(gate, weight, 1e-5)[0], ops.norm(spoilt, weight, 1e-5)[0]
    assert torch.equal(one[[0, 1, 3]], two[[0, 1, 3]]) and two[2].isnan().all()


Case = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def low_rank_case(sizes: list[int], rank: int, size_in: int, size_out: int) -> Case:
    """u, y, dy and factors that lie in one buffer with gaps between the clients."""
    total, clients = sum(sizes), len(sizes)
    buffer = torch.randn(clients, rank * (size_in + size_out) + 3, generator=torch.Generator().manual_seed(3))
    a = buffer[:, : rank * size_in].view(clients, rank, size_in)
    b = buffer[:, rank * size_in : -3].view(clients, size_out, rank)
    return drawn(total, size_in, seed=0), drawn(total, size_out, seed=1), drawn(total, size_out, seed=2), a, b


@needs_tiles
@given(
    sizes=st.lists(st.sampled_from([0, 1, 3, 31, 32, 70]), min_size=1, max_size=3).filter(any),
    rank=st.sampled_from([1, 2, 5, 8, 11, 16]),
    size_in=st.sampled_from([4, 12, 32, 52, 96, 772, 1600]),
    size_out=st.sampled_from([4, 20, 16, 40, 64, 132, 804]),
    needs=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    frozen=st.sampled_from(["none", "weight", "bias"]),
)
def test_low_rank_products(
    sizes: list[int], rank: int, size_in: int, size_out: int, needs: tuple[bool, ...], frozen: str
) -> None:
    u, y, dy, a, b = low_rank_case(sizes, rank, size_in, size_out)
    x, weight, bias = drawn(*u.shape, seed=5), drawn(size_out, size_in, seed=6), drawn(size_out, seed=7)
    scale, found, dx = 1.5, y.clone(), drawn(sum(sizes), size_in, seed=4) if needs[2] else None
    with_product = (
        None if frozen == "none" else (x, Matrix(weight, MatrixLayout.TURNED), bias if frozen == "bias" else None)
    )
    before = None if dx is None else dx.double()
    z = matmul.low_rank_(found, u, (a, b), sizes, scale, with_product)
    da, db = matmul.low_rank_backward(
        dy, (u, z, a, b), sizes, scale, needs[:2], dx, with_product and Matrix(weight, MatrixLayout.PLAIN)
    )
    if with_product:
        y = x.double() @ weight.double().T + (bias.double() if frozen == "bias" else 0)
        before = None if dx is None else dy.double() @ weight.double()
    wide_a, wide_b = (f.bfloat16().double() for f in (a, b))
    rows = list(zip(u.split(sizes), z.split(sizes), y.split(sizes), dy.split(sizes), strict=True))
    assert not z[:, rank:].any()
    exact_z = torch.cat([u_k.double() @ a_k.T for (u_k, *_), a_k in zip(rows, wide_a, strict=True)])
    assert near(z[:, :rank], exact_z, 1.01)
    own_z = [z_k[:, :rank].double() for _, z_k, _, _ in rows]
    added = [scale * z_k @ b_k.T for z_k, b_k in zip(own_z, wide_b, strict=True)]
    assert near(found, y.double() + torch.cat(added), 1.01)
    own_dz = [(scale * dy_k.double() @ b_k).bfloat16().double() for (*_, dy_k), b_k in zip(rows, wide_b, strict=True)]
    assert (da is not None) == needs[0] and (db is not None) == needs[1]
    if da is not None:
        parts = [dz.T[:, :, None] * u_k.double() for (u_k, *_), dz in zip(rows, own_dz, strict=True)]  # (rank, T_k, in)
        flips = [2 * ROUNDING * part.abs().amax(1) if part.numel() else part.sum(1) for part in parts]  # as below
        assert near(da, torch.stack([part.sum(1) for part in parts]), 1.1, torch.stack(flips))
    if db is not None:
        exact = torch.stack([scale * dy_k.double().T @ z_k for (*_, dy_k), z_k in zip(rows, own_z, strict=True)])
        assert torch.allclose(db.double(), exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()) + 1e-30)
    if dx is not None and before is not None:
        terms = torch.cat([dz[:, :, None] * a_k for dz, a_k in zip(own_dz, wide_a, strict=True)])  # (T, rank, in)
        flipped = 2 * ROUNDING * terms.abs().amax(1)  # one dz that was rounded the other way
        assert near(dx, before + terms.sum(1), 1.1, flipped)


@needs_tiles
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("value", [7.0, math.nan])
def test_low_rank_products_of_one_client_change_no_bit_of_another(value: float, frozen: bool) -> None:
    weight = drawn(24, 40, seed=6)

    def passed(spoilt: bool) -> list[Tensor]:
        u, y, dy, a, b = low_rank_case([35, 5, 40], 5, 40, 24)
        if spoilt:
            u[35:40], a[1], b[1], dy[35:40] = value, value, value, value
        dx = torch.zeros_like(u)
        z = matmul.low_rank_(
            y, u, (a, b), [35, 5, 40], 2.0, (u, Matrix(weight, MatrixLayout.TURNED), None) if frozen else None
        )
        da, db = matmul.low_rank_backward(
            dy, (u, z, a, b), [35, 5, 40], 2.0, (True, True), dx, Matrix(weight, MatrixLayout.PLAIN) if frozen else None
        )
        assert da is not None and db is not None
        return [y, dx, da, db]

    for one, two in zip(passed(False), passed(True), strict=True):
        others = [0, 2] if len(one) == 3 else [*range(35), *range(40, 80)]
        assert torch.equal(one[others], two[others]) and not torch.equal(one, two)


@needs_tiles
def test_a_client_has_the_bits_that_it_has_alone() -> None:
    """Whatever its place in a tile of rows, and with sums over more rows of W than are computed with at a time."""
    sizes, size_in, size_out = [35, 5, 40, 1], 900, 800
    u, _, dy, a, b = low_rank_case(sizes, 8, size_in, size_out)
    weight, bias = drawn(size_out, size_in, seed=6), drawn(size_out, seed=7)

    def passed(u: Tensor, dy: Tensor, a: Tensor, b: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor]:
        y, dx = torch.empty_like(dy), torch.empty_like(u)
        z = matmul.low_rank_(y, u, (a, b), sizes, 2.0, (u, Matrix(weight, MatrixLayout.TURNED), bias))
        matmul.low_rank_backward(dy, (u, z, a, b), sizes, 2.0, (True, True), dx, Matrix(weight, MatrixLayout.PLAIN))
        return y, dx

    together = [part.split(sizes) for part in passed(u, dy, a, b, sizes)]
    for k, (own_u, own_dy) in enumerate(zip(u.split(sizes), dy.split(sizes), strict=True)):
        alone = passed(own_u, own_dy, a[k : k + 1], b[k : k + 1], [sizes[k]])
        assert all(torch.equal(one, parts[k]) for one, parts in zip(alone, together, strict=True))


@needs_tiles
def test_gradients_are_written_where_a_leaf_has_them_ready_and_only_once() -> None:
    sizes, size_in, size_out, rank = [35, 5], 40, 24, 5
    u, y, dy, a, b = low_rank_case(sizes, rank, size_in, size_out)
    z = matmul.low_rank_(y, u, (a, b), sizes, 2.0)
    expected = matmul.low_rank_backward(dy, (u, z, a, b), sizes, 2.0, (True, True), None)
    buffer = torch.full((2, 400), math.nan)  # as the leaves of two clients lie side by side
    places = buffer.as_strided(a.shape, (400, size_in, 1), 0), buffer.as_strided(b.shape, (400, rank, 1), 256)
    leaves = tuple(leaf.clone().requires_grad_() for leaf in (a, b))
    for leaf, place in zip(leaves, places, strict=True):
        leaf.grad = place
    found, again = (matmul.low_rank_backward(dy, (u, z, *leaves), sizes, 2.0, (True, True), None) for _ in range(2))
    for place, first, second, true in zip(places, found, again, expected, strict=True):
        assert first is not None and second is not None and true is not None
        assert first.data_ptr() == place.data_ptr() != second.data_ptr()
        assert torch.equal(place, true) and torch.equal(second, true)
    assert int(buffer.isnan().sum()) == buffer.numel() - a.numel() - b.numel()  # nothing beside them


def test_other_numbers_and_devices_are_left_to_torch() -> None:
    assert ops.supports(torch.zeros(1).bfloat16())
    assert not ops.supports(torch.zeros(1).double()) and not ops.supports(torch.zeros(1).half())
    assert not ops.supports(torch.zeros(1).bfloat16(), torch.zeros(1))
    assert not ops.supports(torch.zeros(1, device="meta").bfloat16())
    assert not ops.supports_low_rank(torch.zeros(2, 6).bfloat16(), 8)
    assert not ops.supports_low_rank(torch.zeros(2, 8).bfloat16(), 6)
    fitting, odd = torch.zeros(1, 2, 16).bfloat16(), torch.zeros(1, 2, 24).bfloat16()
    assert not ops.supports_attention(odd, odd, fitting) and not ops.supports_attention(fitting, fitting, odd)


@needs_tiles
def test_a_kernel_without_memory_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes_calls, "_function", lambda name: lambda *arguments: 1)
    with pytest.raises(MemoryError, match="cross_entropy"):
        ops.cross_entropy_(torch.zeros(2, 3).bfloat16(), torch.zeros(2, dtype=torch.int64))
