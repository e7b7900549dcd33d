"""Fixed point: integers by the formula, right on average, sums that cannot wrap, and nothing in the clear."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.aggregators.sum import Sum
from fedllm.errors import ClientError, ConfigError, RoundVoid
from fedllm.messages.context import ClientContext, RoundContext
from fedllm.messages.update import Part, Update
from fedllm.rng import Key
from fedllm.stages.privacy.fixed_point import FixedPoint
from fedllm.stages.privacy.gaussian_dp import GaussianDp
from fedllm.stages.weighting.by_examples import ByExamples
from fedllm.tensors import ring, tree


def context(cohort: int, client: str | None = None) -> RoundContext:
    return RoundContext(2, Key(5), cohort, cohort, client=client)


def encoded(stage: FixedPoint, update: Update, cohort: int, client: str = "a") -> Update:
    sent, memory = stage.encode(update, {}, {}, ClientContext(context(cohort, client)))
    assert memory == {}
    return sent


def summed(stage: FixedPoint, updates: list[Update], cohort: int | None = None) -> Update:
    """Encoded by each client, added up in the type that travels, decoded."""
    cohort = cohort or len(updates)
    sent = [(str(k), encoded(stage, update, cohort, str(k))) for k, update in enumerate(updates)]
    total = Sum().reduce(lambda _, asked: iter(sent), {})
    found, _ = stage.decode(total, {}, {}, context(cohort))
    return found


def delta(*values: float, weight: float = 1.0) -> Update:
    return Update({"delta": Part({"w": torch.tensor(values)}, weight)})


def test_the_integers_are_those_of_the_formula() -> None:
    # m = 16, n = 3, W = 5: floor(32767 / 15) = 2184 levels; c = 0.5, so s = 4368
    stage = FixedPoint(ring=16, bound=0.5, max_weight=5)
    assert stage.levels(3) == 2184
    sent = encoded(stage, delta(0.25, -0.5, 2.5, 100.0, -100.0), 3)
    found = sent.parts["values"].tree["delta/float32/w"]
    # 0.25 x 4368 and so on; W c s = 5 x 2184 = 10920 is the largest
    assert found.dtype == torch.int16 and found.tolist() == [1092, -2184, 10920, 10920, -10920]
    back = summed(stage, [delta(0.25, weight=5), delta(-0.5), delta(1.0)])
    assert back.parts["delta"].weight == 7 and float(back.parts["delta"].tree["w"]) == 0.75


def test_rounding_is_right_on_average_and_moves_less_than_a_step() -> None:
    stage, values = FixedPoint(ring=16, bound=1.0, max_weight=100), torch.linspace(-1, 1, 501)
    step, draws = 1 / stage.levels(100), 400  # 3 levels
    assert stage.levels(100) == 3
    found = torch.stack(
        [
            encoded(stage, Update({"delta": Part({"w": values}, 1.0)}), 100, str(k))
            .parts["values"]
            .tree["delta/float32/w"]
            .double()
            * step
            for k in range(draws)
        ]
    )
    assert float((found - values).abs().max()) < step
    # a draw has a deviation of at most step / 2, their mean one of step / 40: six of them, for 501 values
    assert float((found.mean(0) - values).abs().max()) < 6 * step / 2 / math.sqrt(draws)
    assert len(found.unique(dim=0)) > 1 and not torch.equal(found[0], found[1]), "each client has draws of its own"
    again = encoded(stage, Update({"delta": Part({"w": values}, 1.0)}), 100, "0").parts["values"].tree
    assert torch.equal(again["delta/float32/w"].double() * step, found[0]), "and the same ones again"


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([16, 20, 32]),
    clients=st.integers(1, 12),
    weight=st.floats(0.5, 200),
    bound=st.floats(1e-6, 1e6),
    size=st.sampled_from([1.0, 1e3, 1e30]),
    rotate=st.booleans(),
)
def test_no_sum_wraps_whatever_is_sent(
    bits: int, clients: int, weight: float, bound: float, size: float, rotate: bool
) -> None:
    stage = FixedPoint(bits, bound, weight, rotate)  # type: ignore[arg-type]
    values = torch.tensor([bound * size, -bound * size, 0.0, bound / 3, -bound]).double() * weight
    updates = [
        Update({"delta": Part({"w": values}, weight), "counts": Part({"tokens": torch.tensor(3.0e5)}, 0.0)})
        for _ in range(clients)
    ]
    sent = [encoded(stage, update, clients, str(k)) for k, update in enumerate(updates)]
    for name in ("values", "digits"):
        for key in sent[0].parts[name].tree:
            exact = sum(one.parts[name].tree[key].long() for one in sent)
            assert isinstance(exact, torch.Tensor) and int(exact.abs().max()) <= 2 ** (bits - 1) - 1, key
    total = summed(stage, updates)
    assert total.parts["delta"].weight == pytest.approx(clients * weight, abs=clients * 2.0**-25)
    assert float(total.parts["counts"].tree["tokens"]) == 3.0e5 * clients
    if not rotate:
        step = bound / stage.levels(clients)
        cut = values.clamp(-bound * weight, bound * weight)
        error = (total.parts["delta"].tree["w"] - clients * cut).abs().max()
        assert float(error) <= clients * step * (1 + weight)  # the largest integer is a whole one


def test_a_ring_without_room_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"ring 16 has no room for the sum of 100 clients of weight 400.*wider ring"):
        FixedPoint(16, max_weight=400).levels(100)
    assert FixedPoint(16, max_weight=327).levels(100) == 1
    for changes, text in (
        ({"ring": 24}, "ring is 24"),
        ({"bound": 0.0}, "bound"),
        ({"max_weight": math.inf}, "weight"),
    ):
        with pytest.raises(ConfigError, match=text):
            FixedPoint(**changes)  # type: ignore[arg-type]


def test_figures_weights_and_exact_parts_come_back_exactly_and_nothing_is_in_the_clear() -> None:
    control = torch.tensor([[0.125, -3.0, 2.0**-30], [1e3, 0.0, -(2.0**-40)]])
    update = Update(
        {
            "delta": Part({"w": torch.ones(3)}, 4.0),
            "control": Part({"w": control}, 0.0, exact=True),
            "metrics": Part({"loss": torch.tensor(8.5, dtype=torch.float64)}, 4.0),
            "counts": Part({"tokens": torch.tensor(123456.0, dtype=torch.float64)}, 0.0),
        }
    )
    for bits in (16, 20, 32):
        stage = FixedPoint(bits, max_weight=4)  # type: ignore[arg-type]
        sent = encoded(stage, update, 3)
        assert all(part.weight == 0 for part in sent.parts.values()), "weights stand in a header"
        assert all(not leaf.is_floating_point() for part in sent.parts.values() for leaf in part.tree.values())
        back = summed(stage, [update, update, update])
        assert {name: part.weight for name, part in back.parts.items()} == {
            "delta": 12.0, "control": 0.0, "metrics": 12.0, "counts": 0.0,
        }  # fmt: skip
        assert torch.equal(back.parts["control"].tree["w"], control * 3)
        assert tree.equal(back.parts["metrics"].tree, {"loss": torch.tensor(25.5, dtype=torch.float64)})
        assert tree.equal(back.parts["counts"].tree, {"tokens": torch.tensor(370368.0, dtype=torch.float64)})


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_a_private_stage_bounds_is_exact(bits: int, dtype: torch.dtype) -> None:
    """The sum behind fixed point equals the sum without it, to the bit."""
    private, stage = GaussianDp(0.7, 1.0), FixedPoint(bits)  # type: ignore[arg-type]
    sent = []
    for k in range(5):
        leaves = {"a": torch.randn(3, 7, generator=Key(k).generator(), dtype=dtype), "b": torch.ones(2, dtype=dtype)}
        update = Update({"delta": Part(leaves, 1.0)})
        sent.append(private.encode(update, {}, {}, ClientContext(context(5, str(k))))[0])
    assert sent[0].parts["delta"].grid
    plain = {name: sum(one.parts["delta"].tree[name] for one in sent) for name in ("a", "b")}
    found = summed(stage, sent).parts["delta"]
    assert tree.equal(found.tree, plain) and found.weight == 5  # type: ignore[arg-type]
    lengths = encoded(stage, sent[0], 5).parts["grid"].tree[f"delta/{str(dtype)[6:]}/a"].shape
    assert lengths[1:] == (3, 7) and (lengths[0] == 1) == (bits == 32 and dtype == torch.float32)


# Gaussian updates of deviation 1, c = 6, of which 0.3 is common to all clients: the mean over n has a deviation of
# sqrt(0.09 + 0.91 / n). With L levels, stochastic rounding has the variance f (1 - f) of its fraction, 1/6 of a squared
# level on average, so the mean is off by c / (L sqrt(6 n)): 0.06 %, 0.24 % and 0.8 % of it for n = 10, 100 and 1000.
@pytest.mark.parametrize(
    ("bits", "clients", "levels", "share"),
    [(16, 10, 3276, 5.5e-4), (16, 100, 327, 2.4e-3), (16, 1000, 32, 8.0e-3), (20, 100, 5242, 1.5e-4)],
)
def test_the_error_of_the_mean_is_that_of_theory(bits: int, clients: int, levels: int, share: float) -> None:
    stage = FixedPoint(bits, bound=6.0)  # type: ignore[arg-type]
    assert stage.levels(clients) == levels
    theory = 6 / (levels * math.sqrt(6 * clients)) / math.sqrt(0.09 + 0.91 / clients)
    assert theory == pytest.approx(share, rel=0.03)
    common = torch.randn(2000, generator=Key(-1).generator()).double()
    own = [torch.randn(2000, generator=Key(k).generator()).double() for k in range(clients)]
    values = [0.3 * common + math.sqrt(0.91) * each for each in own]
    found = summed(stage, [Update({"delta": Part({"w": v}, 1.0)}) for v in values])
    exact = torch.stack(values).sum(0)
    error = float((found.parts["delta"].tree["w"] - exact).norm() / exact.norm())
    assert error == pytest.approx(theory, rel=0.15)


def test_a_rotation_is_orthogonal_and_spreads_one_entry() -> None:
    values = torch.zeros(8, dtype=torch.float64)
    values[3] = 2.0
    turned = ring.rotated(values, Key(1).generator())
    assert turned.abs().tolist() == pytest.approx([2 / math.sqrt(8)] * 8)
    torch.testing.assert_close(ring.rotated(turned, Key(1).generator(), back=True), values)
    torch.testing.assert_close(  # two values by hand: (x + y, x - y) / sqrt(2), with the signs of the generator
        ring.rotated(torch.tensor([3.0, 1.0]).double(), Key(2).generator()).square().sort().values,
        torch.tensor([2.0, 8.0]).double(),
    )


def test_rotated_values_need_a_smaller_bound() -> None:
    """One large entry: without a rotation a bound of 0.1 cuts it, with one it comes back."""
    values = torch.zeros(5, 100)
    values[2, 7], values[4, 1] = 2.0, -0.01
    update = Update({"delta": Part({"w": values, "v": torch.full((11,), 0.003)}, 1.0)})
    straight, turned = (summed(FixedPoint(32, 0.1, rotate=rotate), [update] * 3) for rotate in (False, True))
    assert float(straight.parts["delta"].tree["w"][2, 7]) == pytest.approx(0.3)
    torch.testing.assert_close(turned.parts["delta"].tree["w"], values * 3, rtol=0, atol=1e-6)
    assert turned.parts["delta"].tree["v"].shape == (11,)
    sent = encoded(FixedPoint(32, rotate=True), update, 3).parts["values"].tree
    assert tree.num_values(sent) == 512 + 0 and tree.num_values(update.parts["delta"].tree) == 511


def test_what_a_client_must_not_send() -> None:
    stage = FixedPoint(max_weight=2)
    for update, text in (
        (delta(1.0, weight=3), "weighs 3, above fixed_point.max_weight 2"),
        (delta(math.nan), "not finite"),
        (Update({"counts": Part({"tokens": torch.tensor(1e30)}, 0.0)}), "largest figure"),
        (Update({"metrics": Part({"loss": torch.tensor(math.inf)}, 0.0)}), "not finite"),
    ):
        with pytest.raises(ClientError, match=text):
            encoded(stage, update, 3)


def test_a_total_that_is_no_sum_voids_the_round() -> None:
    stage = FixedPoint()
    sent = encoded(stage, delta(1.0), 3)
    part = sent.parts["digits"]
    wrong = sent.having("digits", replace(part, tree=tree.map_leaves(lambda leaf: leaf + 12345, part.tree)))
    with pytest.raises(RoundVoid, match="no sum over the 3 clients"):
        stage.decode(wrong, {}, {}, context(3))
    empty = Update({"delta": Part({"w": torch.zeros(2)}, 0.0)})
    assert stage.decode(empty, {}, {}, context(3))[0] is empty


def test_behind_a_weigher_the_mean_is_fedavg() -> None:
    stages, counts = (ByExamples(), FixedPoint(bound=4.0, max_weight=6)), (2, 6, 1)
    values = [torch.randn(4, 3, generator=Key(k).generator()) for k in range(3)]
    sent = []
    for k, count in enumerate(counts):
        local = ClientContext(context(3, str(k)), facts={"examples": float(count)})
        update = Update({"delta": Part({"w": values[k]})})
        for stage in stages:
            update, _ = stage.encode(update, {}, {}, local)
        sent.append((str(k), update))
    total = Sum().reduce(lambda _, asked: iter(sent), {})
    for stage in reversed(stages):
        total, _ = stage.decode(total, {}, {}, context(3))
    mean = sum(n * v.double() for n, v in zip(counts, values, strict=True)) / 9
    step = 4 / FixedPoint(max_weight=6).levels(3)
    assert total.parts["delta"].tree["w"].dtype == torch.float32
    torch.testing.assert_close(total.parts["delta"].tree["w"].double(), mean, rtol=1e-6, atol=3 * step / 9)
