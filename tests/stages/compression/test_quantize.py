"""Quantize: on the grid, within one step, right in the mean, and the same after the wire."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.errors import ConfigError
from fedllm.messages import serialization
from fedllm.messages.context import ClientContext, RoundContext
from fedllm.messages.update import Part, Update
from fedllm.rng import Key
from fedllm.stages.compression.quantize import Quantize
from fedllm.stages.compression.top_k import TopK
from fedllm.stages.weighting.by_examples import ByExamples
from fedllm.tensors import tree, wire_format
from fedllm.tensors.wire_format import SPARSE
from tests.papers.quadratics import distance, federate, leaves

CTX = RoundContext(round=0, key=Key(11), cohort=1, population=1, client="c")
BITS = [8, 4, 1]
GRID_STEP = {8: 1, 4: 1, 1: 2}  # in scales: 1 bit has only -scale and +scale


def rounded(stage, leaf, *, ctx=CTX, form=wire_format.DENSE):
    update = Update({"delta": Part({"w": leaf}, 1.0, form)})
    sent, memory = stage.encode(update, {}, {}, ClientContext(ctx))
    assert memory == {}
    return sent.parts["delta"]


def spread(part, leaf, block):
    """The scale of each entry."""
    return part.wire_format.scales["w"].repeat_interleave(block)[: leaf.numel()].reshape(leaf.shape)


@st.composite
def leaf_and_block(draw):
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    number = st.one_of(st.just(0.0), st.floats(-1e4, 1e4, width=32).filter(lambda x: x == 0 or abs(x) > 1e-20))
    values = draw(st.lists(number, min_size=rows * columns, max_size=rows * columns))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    return torch.tensor(values, dtype=dtype).reshape(rows, columns), draw(st.integers(1, 12))


@settings(max_examples=150, deadline=None)
@given(leaf_and_block(), st.sampled_from(BITS), st.integers(0, 1000))
def test_values_lie_on_the_grid_within_one_step_and_their_codes_come_back(case, bits, index):
    leaf, block = case
    part = rounded(Quantize(bits=bits, block=block), leaf, ctx=replace(CTX, round=index))
    made, scales = part.tree["w"], part.wire_format.scales["w"]
    assert (part.wire_format.bits, part.wire_format.block) == (bits, block)
    assert made.dtype == leaf.dtype
    top = wire_format.levels(bits)
    torch.testing.assert_close(scales, wire_format.quantization_blocks(leaf, block).abs().amax(1) / top, rtol=0, atol=0)
    step = GRID_STEP[bits] * spread(part, leaf, block)
    assert bool(((made - leaf).abs() <= step * (1 + 1e-5)).all())
    codes = wire_format.codes(made, scales, block)
    assert int(codes.abs().max()) <= top
    assert torch.equal(wire_format.values(codes, scales, leaf.shape), made)
    squeezed = wire_format.unpack_bits(
        wire_format.pack_bits(codes.reshape(-1)[: leaf.numel()], bits), bits, leaf.numel()
    )
    assert torch.equal(wire_format.values(wire_format.quantization_blocks(squeezed, block), scales, leaf.shape), made)
    received = serialization.deserialize(serialization.serialize(Update({"delta": part})))
    assert isinstance(received, Update)
    assert tree.equal(received.parts["delta"].tree, part.tree)


@pytest.mark.parametrize("bits", BITS)
def test_the_mean_of_many_draws_is_the_value(bits):
    leaf, draws = torch.linspace(-1, 1, 201, dtype=torch.float64).reshape(3, 67) ** 3, 2000
    stage = Quantize(bits=bits, block=32)
    made = torch.stack([rounded(stage, leaf, ctx=replace(CTX, round=r)).tree["w"] for r in range(draws)])
    scale = spread(rounded(stage, leaf), leaf, 32)
    # one step of the grid is a coin between its ends: variance (step)² f (1 - f), f the place between them
    step = GRID_STEP[bits] * scale
    place = (leaf / step + (0.5 if bits == 1 else 0)) % 1
    error = step * (place * (1 - place) / draws).sqrt()
    z = ((made.mean(0) - leaf) / error.clamp(min=1e-12))[error > 1e-9]
    assert z.numel() > 150
    assert float(z.abs().max()) < 4.5  # over 200 entries
    assert 0.8 < float((z**2).mean()) < 1.25
    nearest = torch.round(leaf / scale) * scale  # rounding to the nearest is biased: the test would see it
    assert float(((nearest - leaf) / error.clamp(min=1e-12))[error > 1e-9].abs().max()) > 20


def test_eight_bit_codes_by_hand():
    # scale = 254/127 = 2: even values are on the grid and stay, odd ones go to a neighbour
    leaf = torch.tensor([254.0, -254.0, 6.0, 0.0, 7.0])
    part = rounded(Quantize(bits=8), leaf)
    assert part.wire_format.scales["w"].tolist() == [2.0]
    assert part.tree["w"][:4].tolist() == leaf[:4].tolist()
    assert float(part.tree["w"][4]) in (6.0, 8.0)


def test_bytes_are_bits_of_the_values_and_one_scale_a_block():
    leaf = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    sizes = {
        bits: serialization.part_bytes(Update({"delta": rounded(Quantize(bits=bits), leaf)}))["delta"] for bits in BITS
    }
    assert sizes == {8: 1024 + 32, 4: 512 + 32, 1: 128 + 32}


def test_draws_differ_by_round_client_part_and_leaf_and_repeat_with_the_same():
    leaf = torch.linspace(0.1, 1, 100)
    stage, update = Quantize(bits=4), Update({name: Part({"u": leaf, "w": leaf}, 1.0) for name in ("delta", "control")})

    def made(ctx, update=update):
        sent, _ = stage.encode(update, {}, {}, ClientContext(ctx))
        return {f"{name}/{key}": value for name, part in sent.parts.items() for key, value in part.tree.items()}

    first = made(CTX)
    assert len({tuple(value.tolist()) for value in first.values()}) == 4
    assert tree.equal(first, made(CTX))
    for other in (replace(CTX, round=1), replace(CTX, client="d"), replace(CTX, key=Key(12))):
        assert not torch.equal(first["delta/w"], made(other)["delta/w"])
    backwards = Update({name: Part(dict(reversed(part.tree.items())), 1.0) for name, part in update.parts.items()})
    assert tree.equal(first, made(CTX, backwards))


def test_figures_and_integers_are_exact():
    parts = {
        "metrics": Part({"loss": torch.tensor([0.123, 0.456])}, 1.0),
        "counts": Part({"tokens": torch.tensor([12345.0, 678.0])}, 0.0),
        "votes": Part({"n": torch.tensor([1, 2, 3])}, 0.0),
    }
    sent, _ = Quantize(bits=1).encode(Update(parts), {}, {}, ClientContext(CTX))
    for name, part in parts.items():
        assert tree.equal(sent.parts[name].tree, part.tree)


@pytest.mark.parametrize("bits", BITS)
def test_a_sparse_part_stays_sparse_with_its_zeros(bits):
    leaf = torch.randn(20, 30, generator=torch.Generator().manual_seed(1))
    update, _ = TopK(fraction=0.1).encode(Update({"delta": Part({"w": leaf})}), {}, {}, ClientContext(CTX))
    before = update.parts["delta"].tree["w"]
    part = rounded(Quantize(bits=bits), before, form=SPARSE)
    assert part.wire_format is SPARSE
    assert not part.tree["w"][before == 0].any()
    if bits == 1:
        assert bool((part.tree["w"][before != 0] != 0).all())
    received = serialization.deserialize(serialization.serialize(Update({"delta": part})))
    assert isinstance(received, Update)
    assert tree.equal(received.parts["delta"].tree, part.tree)


@pytest.mark.parametrize("bits", BITS)
def test_only_the_window_is_rounded_and_sent(bits):
    generator = torch.Generator().manual_seed(2)
    box, window = torch.randn(5, 30, generator=generator, dtype=torch.float64), ((10, 15), (0, 30))
    leaf = wire_format.write_window(box, window, torch.Size([40, 30]))
    part = rounded(Quantize(bits=bits, block=64), leaf, form=wire_format.WireFormat(windows={"w": window}))
    alone = rounded(Quantize(bits=bits, block=64), box)
    assert torch.equal(wire_format.read_window(part.tree["w"], window), alone.tree["w"])
    assert int(part.tree["w"].count_nonzero()) == int(alone.tree["w"].count_nonzero()) > 0, "zeros elsewhere"
    sizes = [serialization.part_bytes(Update({"delta": made})) for made in (part, alone)]
    assert sizes[0] == sizes[1] == {"delta": -(-150 * bits // 8) + 8 * 3}
    received = serialization.deserialize(serialization.serialize(Update({"delta": part})))
    assert isinstance(received, Update)
    assert tree.equal(received.parts["delta"].tree, part.tree)


def test_a_product_of_two_parts_is_right_in_the_mean():
    """Rows and columns of a stack draw apart: E[Q(b) Q(a)] = b a. Drawn together, it would be 1 for halves."""
    half, draws = torch.tensor([0.5, 1.0], dtype=torch.float64), 4000
    update, made = Update({"rows": Part({"w": half}, 1.0), "columns": Part({"w": half}, 0.0)}), []
    for index in range(draws):
        sent, _ = Quantize(bits=1).encode(update, {}, {}, ClientContext(replace(CTX, round=index)))
        made.append([sent.parts[name].tree["w"][0] for name in ("rows", "columns")])
    rows, columns = torch.tensor(made, dtype=torch.float64).T
    assert abs(float((rows * columns).mean()) - 0.25) < 5 * (1 - 0.25**2) ** 0.5 / draws**0.5
    assert float((rows * rows).mean()) == 1, "the same draw twice"


def test_marks_are_exact_and_say_so():
    marks = {"w": torch.tensor([1.0, 1.0, 0.0])}
    update = Update({"holders": Part(marks, 3.0, exact=True), "other": Part(marks, 3.0)})
    sent, _ = Quantize(bits=1).encode(update, {}, {}, ClientContext(CTX))
    assert tree.equal(sent.parts["holders"].tree, marks)
    assert sent.parts["other"].tree["w"][2] != 0, "one bit has no zero"


def test_half_precision_becomes_float32_so_that_the_codes_survive():
    leaf = torch.linspace(-1, 1, 300).to(torch.bfloat16)
    part = rounded(Quantize(bits=8), leaf)
    assert part.tree["w"].dtype == torch.float32
    received = serialization.deserialize(serialization.serialize(Update({"delta": part})))
    assert isinstance(received, Update)
    assert tree.equal(received.parts["delta"].tree, part.tree)


def test_a_run_at_8_bits_stays_within_the_declared_rounding():
    plain, coarse = federate([ByExamples()], 1), federate([ByExamples(), Quantize(bits=8)], 1)
    # weighted deltas move by at most one scale each; the server divides their sum by 40 examples
    bound = sum(float(s) for u in coarse.sent for s in u.parts["delta"].wire_format.scales["layer.lora_A"]) / 40
    gap = float((coarse.params["layer.lora_A"] - plain.params["layer.lora_A"]).abs().max())
    assert 0 < gap <= bound * (1 + 1e-9)


def test_a_run_at_8_bits_lands_near_the_same_place():
    plain, coarse = federate([ByExamples()], 60), federate([ByExamples(), Quantize(bits=8)], 60)
    assert 0 < distance(coarse.params, plain.params) < 0.1
    assert distance(leaves(0.0), plain.params) > 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Quantize(bits=2), "quantize.bits is 2; it must be 8, 4 or 1"),
        (lambda: Quantize(bits=4, block=0), "quantize.block is 0; it must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        make()
