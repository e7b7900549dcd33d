"""LoRA-FAIR on layers that are not square, with clients of unequal size, over the wire."""

from __future__ import annotations

import pytest
import torch

from fedllm.errors import CheckError, ConfigError, RunError
from fedllm.stages.lora.fair import LoraFair
from fedllm.tensors import low_rank
from tests.stages.lora.test_unequal_ranks import LAYERS, WEIGHTS, Round, drawn, mean_of_products, off, product


def a_round(penalty: float) -> Round:
    return Round(drawn(4, 0), [drawn(4, seed) for seed in (1, 2, 3)], LoraFair(penalty))


def means(round: Round, layer: str) -> low_rank.Pair:
    pairs = [low_rank.pair(leaves, layer) for leaves in round.after]
    b, a = (sum(p * pair[side].double() for p, pair in zip(WEIGHTS, pairs, strict=True)) for side in (0, 1))
    return b, a  # type: ignore[return-value]


@pytest.mark.parametrize("layer", LAYERS)
def test_no_b_is_nearer_to_the_mean_of_the_products(layer: str) -> None:
    """Without a penalty: what is left of P is orthogonal to the rows of A, and less than averaging leaves."""
    round = a_round(0.0)
    found, wanted, (mean_b, mean_a) = round.result(), mean_of_products(round, layer), means(round, layer)
    left = wanted - product(found, layer)
    assert off(low_rank.pair(found, layer)[1], mean_a) < 1e-6
    assert float((left @ mean_a.T).norm()) < 1e-5 * float(wanted.norm() * mean_a.norm())
    assert float(left.norm()) < 0.999 * float((wanted - mean_b @ mean_a).norm())


@pytest.mark.parametrize("layer", LAYERS)
def test_the_penalised_minimum_has_no_gradient(layer: str) -> None:
    """d/dD of ||P - (B + D) A||^2 + lambda ||D||^2, by autograd."""
    penalty = 50.0
    round = a_round(penalty)
    found, wanted, (mean_b, mean_a) = round.result(), mean_of_products(round, layer), means(round, layer)
    step = (low_rank.pair(found, layer)[0].double() - mean_b).requires_grad_()
    distance = (wanted - (mean_b + step) @ mean_a).square().sum() + penalty * step.square().sum()
    (gradient,) = torch.autograd.grad(distance, step)
    zero = torch.zeros_like(step, requires_grad=True)
    (before,) = torch.autograd.grad((wanted - (mean_b + zero) @ mean_a).square().sum(), zero)
    assert float(gradient.norm()) < 1e-5 * float(before.norm())


@pytest.mark.parametrize("layer", LAYERS)
def test_a_large_penalty_is_the_mean_of_the_factors(layer: str) -> None:
    found = a_round(1e12).result()
    for leaf, mean in zip(low_rank.pair(found, layer), means(a_round(0.0), layer), strict=True):
        assert off(leaf, mean) < 1e-6


def test_equal_clients_need_no_correction() -> None:
    one = drawn(4, 5)
    found = Round(drawn(4, 0), [one] * 3, LoraFair()).result()
    assert all(off(found[name], leaf) < 1e-6 for name, leaf in one.items())


def test_rows_that_are_zero_are_borne() -> None:
    zero = {name: torch.zeros_like(leaf) for name, leaf in drawn(4, 0).items()}
    found = Round(drawn(4, 0), [zero] * 3, LoraFair(0.0)).result()
    assert all(float(leaf.abs().max()) < 1e-6 for leaf in found.values())


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(ConfigError, match=r"lora_fair.penalty is -1"):
        LoraFair(-1.0)
    spoilt = a_round(0.01)
    next(iter(spoilt.after[1].values()))[0, 0] = float("nan")
    with pytest.raises(RunError, match=r"round 0, .*not finite; lower work.sgd.lr"):
        spoilt.result()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"demands": {"secrecy": True}}, "demands.secrecy"),
        ({"task": {"model": "tiny-llama", "scope": {"freeze": ["*lora_A"]}}}, "works on both factors of lora"),
    ],
)
def test_what_it_cannot_take_is_refused(changes: dict[str, object], sentence: str) -> None:
    from fedllm.experiment.checks.check import check
    from tests.papers.test_presets import made

    with pytest.raises(CheckError, match=sentence):
        check(made("lora_fair", **changes))
