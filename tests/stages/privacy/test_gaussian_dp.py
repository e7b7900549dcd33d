"""The noise that leaves the server: its size after dropouts, its key, and what one client can change."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fedllm.errors import ConfigError
from fedllm.messages.context import ClientContext, RoundContext
from fedllm.messages.update import Part, Update
from fedllm.rng import Key
from fedllm.stages.compression.quantize import Quantize
from fedllm.stages.privacy.base import UnprotectedError
from fedllm.stages.privacy.gaussian_dp import AdaptiveClip, GaussianDp
from fedllm.stages.weighting.uniform import Uniform
from fedllm.tensors import tree
from tests.stages.privacy.source import Source, drawn, flat, server

CLIENTS, CLIP, Z = 10, 0.7, 1.3
STAGE = GaussianDp(CLIP, Z)


def local(client: int = 0, clients: int = CLIENTS) -> ClientContext:
    return ClientContext(RoundContext(0, Key(0), clients, clients, client=str(client)), noise=Source())


def summed(updates, stage=STAGE, scratch=None) -> Update:
    sent = [stage.encode(update, scratch or {}, {}, local(k))[0] for k, update in enumerate(updates)]
    total = {name: tree.map_leaves(torch.clone, part.tree) for name, part in sent[0].parts.items()}
    for update in sent[1:]:
        for name, part in update.parts.items():
            tree.add_(total[name], part.tree)
    return Update(
        {name: Part(leaves, float(len(sent)) if sent[0].parts[name].weight else 0.0) for name, leaves in total.items()}
    )


def noises(stage: GaussianDp, total: Update, runs: int, **facts) -> torch.Tensor:
    """(runs, values): what is added, each with a key of its own."""
    plain = flat(total, "delta")
    released = [stage.decode(total, {}, {}, server(Source(n), clients=CLIENTS, **facts))[0] for n in range(runs)]
    return torch.stack([flat(one, "delta") for one in released]) - plain


@pytest.mark.parametrize("lost", [0, 2, 4])  # 0 to 40 %
def test_the_noise_is_right_whoever_answers(lost):
    total = summed(list(drawn(CLIENTS))[lost:])
    found = noises(STAGE, total, runs=400, cohort=CLIENTS)
    assert float(found.std()) == pytest.approx(Z * CLIP, rel=0.01)  # 88,400 draws: 1 % is 4 standard errors
    assert abs(float(found.mean())) < 5 * Z * CLIP / math.sqrt(found.numel())
    halved = noises(replace(STAGE, noise_multiplier=Z / 2), total, runs=400)
    assert float(halved.std()) < 0.9 * Z * CLIP, "a halved noise is caught"
    mean = Uniform("expected").decode(
        STAGE.decode(total, {}, {}, server(Source(), clients=CLIENTS))[0], {}, {}, server(Source(), clients=CLIENTS)
    )[0]
    noised = STAGE.decode(total, {}, {}, server(Source(), clients=CLIENTS))[0]
    assert torch.allclose(flat(mean, "delta") * CLIENTS, flat(noised, "delta")), (
        "a number that nobody's absence changes"
    )


def test_an_empty_round_is_noised_and_divided_like_any_other():
    (like,) = drawn(1)
    empty = Update({"delta": Part(tree.zeros_like(like.parts["delta"].tree), 0.0)})
    found = noises(STAGE, empty, runs=400, cohort=0)
    assert float(found.std()) == pytest.approx(Z * CLIP, rel=0.01)
    noised = STAGE.decode(empty, {}, {}, server(Source(), clients=CLIENTS, cohort=0))[0]
    mean = Uniform("expected").decode(noised, {}, {}, server(Source(), clients=CLIENTS, cohort=0))[0]
    assert torch.allclose(flat(mean, "delta") * CLIENTS, flat(noised, "delta"))


def test_one_client_moves_the_sum_by_the_clip_at_most():
    updates = list(drawn(CLIENTS))
    whole = flat(summed(updates), "delta")
    for k in range(CLIENTS):
        assert float((whole - flat(summed(updates[:k] + updates[k + 1 :]), "delta")).norm()) <= CLIP
    mean = Update(
        {"delta": Part(tree.scale(summed(updates, GaussianDp(1e9, 0.0)).parts["delta"].tree, 1 / CLIENTS), 1.0)}
    )
    rest = Update(
        {"delta": Part(tree.scale(summed(updates[:-1], GaussianDp(1e9, 0.0)).parts["delta"].tree, 1 / CLIENTS), 1.0)}
    )
    after = [STAGE.encode(one, {}, {}, local())[0] for one in (mean, rest)]
    assert float((flat(after[0]) - flat(after[1])).norm()) > CLIP / CLIENTS, "clipping the mean bounds nobody's part"


def test_weights_by_examples_break_the_bound():
    updates = list(drawn(CLIENTS))
    sent = [STAGE.encode(update, {}, {}, local())[0] for update in updates]
    weights = torch.arange(1, CLIENTS + 1).double()
    weighed = [flat(one) * w / weights.sum() * CLIENTS for one, w in zip(sent, weights, strict=True)]
    assert float(weighed[-1].norm()) > CLIP


def test_noise_follows_from_the_sum_that_it_hides():
    total, other = summed(drawn(CLIENTS)), summed(drawn(CLIENTS, seed=1))
    source = Source()
    one, again = (STAGE.decode(total, {}, {}, server(source, clients=CLIENTS))[0] for _ in range(2))
    assert torch.equal(flat(one), flat(again)), "the same release"
    STAGE.decode(other, {}, {}, server(source, clients=CLIENTS))
    digests = [digest for _, _, _, digest in source.asked]
    assert digests[0] == digests[1] != digests[2]
    assert source.asked[0][:3] == ("gaussian_dp", "gaussian", Z)


def test_the_ratio_of_signal_to_noise_is_told():
    total, source = summed(drawn(CLIENTS)), Source()
    noised, _ = STAGE.decode(total, {}, {}, server(source, clients=CLIENTS))
    ((length, noise),) = source.ratios
    assert length == pytest.approx(float(flat(noised).norm()), rel=1e-6)
    assert noise == pytest.approx(Z * CLIP * math.sqrt(221))


def test_groups_are_noised_by_their_bounds():
    stage = GaussianDp(CLIP, Z, groups={"a": 0.1})
    found = noises(stage, summed(drawn(CLIENTS), stage), runs=2000)
    spread = Z * math.sqrt(2)
    assert float(found[:, :210].std()) == pytest.approx(spread * 0.1, rel=0.01)
    assert float(found[:, 210:].std()) == pytest.approx(spread * CLIP, rel=0.02)  # 22,000 draws


def test_an_adapting_clip_counts_who_was_cut_and_pays_for_it():
    clip = 8.0
    stage = GaussianDp(clip, Z, adaptive=AdaptiveClip(count_noise=1.0, quantile=0.5, lr=0.2))
    scratch = {"clip": torch.tensor(clip, dtype=torch.float64)}
    updates = list(drawn(CLIENTS))
    total = summed(updates, stage, scratch)
    uncut = sum(float(flat(update).norm()) <= clip for update in updates)
    assert 0 < uncut < CLIENTS
    assert float(total.parts["uncut"].tree["half"]) == uncut - CLIENTS / 2
    found = noises(stage, total, runs=400)
    grown = (Z**-2 - 2.0**-2) ** -0.5
    assert float(found.std()) == pytest.approx(grown * clip, rel=0.01)
    clips = [
        math.log(float(stage.decode(total, {}, {}, server(Source(n), clients=CLIENTS))[1]["clip"]) / clip)
        for n in range(400)
    ]
    shares = torch.tensor([0.5 - moved / 0.2 for moved in clips])
    inside = shares[(shares > 0) & (shares < 1)]
    assert float(inside.mean()) == pytest.approx(uncut / CLIENTS, abs=0.02)  # 0.1 / 20 is the standard error
    assert float(inside.std()) == pytest.approx(0.1, rel=0.15), "noise of one client on the count"
    with pytest.raises(ConfigError, match=r"gaussian_dp\.adaptive\.count_noise is 0\.5; it must be above 0\.65"):
        GaussianDp(clip, Z, adaptive=AdaptiveClip(count_noise=0.5))


def test_nothing_is_released_without_a_source_or_a_number():
    total = summed(drawn(CLIENTS))
    with pytest.raises(UnprotectedError, match="no source"):
        STAGE.decode(total, {}, {}, RoundContext(0, Key(0), CLIENTS, CLIENTS))
    with pytest.raises(UnprotectedError, match="nobody has calibrated it"):
        GaussianDp(CLIP).decode(total, {}, {}, server(Source(), clients=CLIENTS))


def test_values_in_few_bits_keep_the_bound_and_the_exact_sum():
    sent, _ = STAGE.encode(next(drawn(1)), {}, {}, local())
    packed, _ = Quantize(8).encode(sent, {}, {}, local())
    assert float(flat(packed).norm()) <= float(flat(sent).norm())
    assert float((flat(packed) - flat(sent)).norm()) < 0.05 * float(flat(sent).norm())
    ratio = flat(packed) / sent.parts["delta"].grid
    assert torch.equal(ratio, ratio.round())


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, 1e-40, 1e38])
def test_a_clip_is_a_number_that_float32_can_add_up(value):
    with pytest.raises(ConfigError, match=r"gaussian_dp\.clip is .*; it must be 1e-30 to 1e\+30"):
        GaussianDp(value, 1.0)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, 1e-300, 1e300])
def test_noise_is_none_or_a_number_that_an_accountant_can_square(value):
    with pytest.raises(ConfigError, match=r"gaussian_dp\.noise_multiplier is .*; it must be 0, or 1e-06 to 1e\+06"):
        GaussianDp(1.0, value)
