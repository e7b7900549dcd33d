"""DP-SGD: a textbook loop, Opacus, what couples examples and what does not, the noise, the coins, the guards."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedllm.errors import ClientError, ConfigError
from fedllm.experiment.privacy import example_release
from fedllm.messages.context import Profile
from fedllm.models.adapters.base import Adapter
from fedllm.models.adapters.lora import Lora
from fedllm.models.adapters.soft_prompt import SoftPrompt
from fedllm.models.base_models.load import load_base
from fedllm.models.batch import IGNORE, Example, collate
from fedllm.models.loaded_model import LoadedModel
from fedllm.privacy.noise import NoiseStream, derive
from fedllm.privacy.releases import Release
from fedllm.privacy.schemes import PoissonScheme
from fedllm.tensors import tree
from fedllm.tensors.tree import Tree
from fedllm.training.base import ClientJob, TrainOptions, run_work
from fedllm.training.clipped_sums import Clip
from fedllm.training.dp_sgd import DpSgd
from fedllm.training.gradient_descent import Carry
from fedllm.training.lr_schedule import LrSchedule
from fedllm.training.sgd import Sgd
from tests.training.private import SECRET, Noise, private_job
from tests.training.test_sgd import DATA, KEY, LORA, ctx, delta, example, job, model_of, result, start

FREE = 1e9  # a clip that clips nothing
EXACT_WORKS = {
    "sgd": DpSgd(lr=0.3, steps=3, batch_size=2, clip=FREE, noise_multiplier=0),
    "momentum": DpSgd(lr=0.1, steps=4, batch_size=2, momentum=0.9, weight_decay=0.1, clip=FREE, noise_multiplier=0),
    "adamw": DpSgd("adamw", lr=0.01, steps=3, batch_size=2, weight_decay=0.5, clip=FREE, noise_multiplier=0),
    "schedule": DpSgd(
        lr=0.3, steps=5, batch_size=3, clip=FREE, noise_multiplier=0, lr_schedule=LrSchedule("cosine", warmup=2)
    ),
    "clipped": DpSgd(lr=0.3, steps=3, batch_size=3, clip=0.5, noise_multiplier=0),
    "micro-batches": DpSgd(lr=0.3, steps=3, batch_size=4, accumulation=4, clip=0.5, noise_multiplier=0),
    "all at once": DpSgd(lr=0.3, steps=2, batch_size=50, clip=0.5, noise_multiplier=0),
}
NOISED = DpSgd(lr=0.3, steps=3, batch_size=2, clip=0.5, noise_multiplier=1.0)


def gradient_of(model: LoadedModel, params: Tree, item: Example) -> Tree:
    """One example's gradient, by a pass of its own."""
    leaves = {name: leaf[None].clone().requires_grad_() for name, leaf in params.items()}
    (loss,) = model.losses(leaves, collate([[item]]))
    return {name: grad[0] for name, grad in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)}


def clipped(gradient: Tree, clip: float) -> Tree:
    return tree.scale(
        gradient, min(1.0, clip / math.sqrt(sum(float(leaf.square().sum()) for leaf in gradient.values())))
    )


def drawn(work: DpSgd, client: str) -> list[list[int]]:
    """The Poisson batches of a simulation, by their definition."""
    generator, count = ctx(client).rng("batches"), len(DATA[client])
    rate = min(1.0, work.batch_size / count)
    assert work.steps is not None
    return [
        [i for i, coin in enumerate(torch.rand(count, generator=generator, dtype=torch.float64)) if coin < rate]
        for _ in range(work.steps)
    ]


def textbook(work: DpSgd, model: LoadedModel, client: str) -> Tree:
    """One example at a time, one optimiser of torch, the divisor fixed."""
    begin = start(model)
    now = {name: leaf.clone().requires_grad_() for name, leaf in begin.items()}
    leaves = list(now.values())
    if work.optimizer == "adamw":
        kind: Any = torch.optim.AdamW(leaves, lr=work.lr, weight_decay=work.weight_decay, foreach=False)
    else:
        kind = torch.optim.SGD(leaves, lr=work.lr, momentum=work.momentum, weight_decay=work.weight_decay)
    for step, chosen in enumerate(drawn(work, client)):
        for leaf in leaves:
            leaf.grad = torch.zeros_like(leaf)
        for index in chosen:
            own = clipped(
                gradient_of(model, {n: leaf.detach() for n, leaf in now.items()}, DATA[client][index]), work.clip
            )
            for name, leaf in now.items():
                leaf.grad = leaf.grad + own[name] / work.batch_size
        kind.param_groups[0]["lr"] = work.lr * work.lr_schedule.factor(step=step, steps=work.steps, round=2, rounds=4)
        kind.step()
    return {name: leaf.detach() - begin[name] for name, leaf in now.items()}


# without noise


@pytest.mark.parametrize("client", ["anna", "carl"])
@pytest.mark.parametrize("name", EXACT_WORKS)
def test_without_noise_it_is_a_textbook_loop(name: str, client: str) -> None:
    model, work = model_of(), EXACT_WORKS[name]
    (outcome,) = run_work(work, [job(model, client)], model)
    expected = textbook(work, model, client)
    assert tree.norm(tree.sub(delta(outcome), expected)) < 1e-9 * tree.norm(expected)
    assert result(outcome)[1]["steps"] == work.steps


def test_where_everybody_takes_part_it_is_sgd() -> None:
    """A batch of all examples, nothing clipped: the mean of their gradients."""
    model, count = model_of(), len(DATA["anna"])
    private = DpSgd(lr=0.3, steps=3, batch_size=count, clip=FREE, noise_multiplier=0)
    one, other = (
        delta(*run_work(work, [job(model, "anna")], model))
        for work in (private, Sgd(lr=0.3, steps=3, batch_size=count))
    )
    assert tree.norm(tree.sub(one, other)) < 1e-9 * tree.norm(other)


@pytest.mark.parametrize(
    "adapter", [LORA, Lora(rank=4, dropout=0.3), SoftPrompt(tokens=2)], ids=["lora", "drop", "soft"]
)
@pytest.mark.parametrize("work", [EXACT_WORKS["clipped"], EXACT_WORKS["adamw"], NOISED], ids=["clip", "adamw", "noise"])
def test_a_stack_is_its_clients_one_by_one(work: DpSgd, adapter: Adapter) -> None:
    """Also the noise: a client's does not depend on who stands beside it. A sum of another order may round to another
    step of the grid, which is 2^-20 of the clip."""
    model = model_of(adapter)
    jobs = [private_job(model, client) for client in DATA]
    for one, outcome in zip(jobs, run_work(work, jobs, model), strict=True):
        (alone,) = run_work(work, [one], model)
        assert tree.norm(tree.sub(delta(outcome), delta(alone))) < 2.0**-20 * tree.norm(delta(alone))


def test_unequal_ranks_share_a_stack_and_no_noise_falls_on_what_a_client_lacks() -> None:
    model = model_of()
    jobs = [private_job(model, client) for client in ("anna", "ben")]
    small = {n: leaf[:2] if n.endswith("lora_A") else leaf[:, :2] for n, leaf in jobs[1].initial.items()}
    jobs[1] = replace(jobs[1], initial=small)
    for one, outcome in zip(jobs, run_work(NOISED, jobs, model), strict=True):
        (alone,) = run_work(NOISED, [one], model)
        assert {n: leaf.shape for n, leaf in delta(outcome).items()} == {
            n: leaf.shape for n, leaf in one.initial.items()
        }
        assert tree.norm(tree.sub(delta(outcome), delta(alone))) < 2.0**-20 * tree.norm(delta(alone))


def test_micro_batches_and_recomputation_change_nothing_else() -> None:
    model, jobs = model_of(), [private_job(model_of(), client) for client in DATA]
    work = replace(NOISED, batch_size=6)
    plain = run_work(work, jobs, model)
    for other, how in ((replace(work, accumulation=3), TrainOptions()), (work, TrainOptions(recompute=True))):
        for one, two in zip(plain, run_work(other, jobs, model, how), strict=True):
            assert tree.norm(tree.sub(delta(one), delta(two))) < 2.0**-20 * tree.norm(delta(one))


def test_clients_of_unequal_steps() -> None:
    """Profiles: the one with fewer steps stands still at the end, though its partner goes on."""
    model = model_of()
    jobs = [private_job(model, client) for client in ("anna", "ben")]
    short = replace(jobs[1], ctx=replace(jobs[1].ctx, profile=Profile(steps=1)))
    outcomes = run_work(NOISED, [jobs[0], short], model)
    assert [result(outcome)[1]["steps"] for outcome in outcomes] == [3, 1]
    (alone,) = run_work(NOISED, [short], model)
    assert tree.norm(tree.sub(delta(outcomes[1]), delta(alone))) < 2.0**-20 * tree.norm(delta(alone))


# what one example can change


def sums(model: LoadedModel, items: Sequence[Example], clip: float) -> Tree:
    """The clipped sum of a full batch: minus the step of plain descent, times the divisor."""
    work = DpSgd(lr=1.0, steps=1, batch_size=len(items), clip=clip, noise_multiplier=0)
    moved = delta(*run_work(work, [job(model, "anna", examples=items)], model))
    return tree.scale(moved, -float(len(items)))


def batch_mean(model: LoadedModel, items: Sequence[Example], clip: float) -> Tree:
    """The twin: the mean over the batch is clipped, as `clip_norm` of `sgd` does."""
    work = Sgd(lr=1.0, steps=1, batch_size=len(items), clip_norm=clip)
    return tree.scale(delta(*run_work(work, [job(model, "anna", examples=items)], model)), -float(len(items)))


def test_one_example_moves_the_sum_by_the_clip_and_no_more() -> None:
    model, clip = model_of(), 0.5
    most = 0.0
    for place, item in enumerate(DATA["carl"]):
        rest = [other for other in DATA["carl"] if other is not item]
        change = tree.sub(sums(model, DATA["carl"], clip), sums(model, rest, clip))
        expected = clipped(gradient_of(model, start(model), item), clip)
        assert tree.norm(tree.sub(change, expected)) < 1e-9 * clip, place
        most = max(most, tree.norm(change))
    assert clip * (1 - 1e-9) < most < clip * (1 + 1e-9)


def test_negative_control_clipping_the_mean_of_a_batch_breaks_the_bound() -> None:
    model, clip, items = model_of(), 0.5, DATA["carl"]
    change = tree.sub(batch_mean(model, items, clip), batch_mean(model, items[1:], clip))
    assert tree.norm(change) > 1.5 * clip


def test_negative_control_a_mean_over_the_tokens_of_a_batch_couples_examples() -> None:
    """As transformers' default loss does: the gradient of an example changes when its partner gets shorter."""
    base = load_base("tiny-llama", dtype="float64").model.requires_grad_(True)
    leaf = base.get_parameter("model.layers.0.self_attn.q_proj.weight")

    def by_tokens(items: Sequence[Example]) -> Tensor:
        """The gradient of the first example's part of the batch's loss."""
        total = sum(int((item.targets != IGNORE).sum()) for item in items)
        logits = base(items[0].tokens[None]).logits[0]
        loss = cross_entropy(logits, items[0].targets, ignore_index=IGNORE, reduction="sum") / total
        return torch.autograd.grad(loss, leaf)[0]

    item, long, short = example(16, 1, labels=15), example(16, 2, labels=15), example(3, 2, labels=2)
    one, two = (by_tokens([item, other]) for other in (long, short))
    assert float(two.norm() / one.norm()) == pytest.approx((15 + 15) / (15 + 2), rel=1e-9)
    model = model_of()
    ours = [tree.sub(sums(model, [item, other], FREE), sums(model, [other], FREE)) for other in (long, short)]
    assert tree.norm(tree.sub(ours[0], ours[1])) < 1e-9 * tree.norm(ours[0])


def test_partners_lengths_and_order_change_no_gradient() -> None:
    """Relative to 1e-6 is what counts as sound; float64 gives more."""
    model, item = model_of(), DATA["anna"][1]
    alone = sums(model, [item], 0.5)
    for others in ([DATA["ben"][0]], [example(40, 5, labels=30)], [example(2, 6, labels=1)] * 3):
        for items in ([item, *others], [*others, item]):
            change = tree.sub(sums(model, items, 0.5), sums(model, others, 0.5))
            assert tree.norm(tree.sub(change, alone)) < 1e-9 * tree.norm(alone)


def test_an_example_without_a_finite_gradient_counts_as_zeros() -> None:
    """Its client does not fail, which would tell of it; the others have their own gradients."""
    model = model_of(dtype="float32")
    items = DATA["anna"]
    work = DpSgd(lr=1.0, steps=1, batch_size=len(items), clip=0.5, noise_multiplier=0)
    whole = delta(*run_work(work, [job(model, "anna")], model))

    class Broken:
        """A model whose loss of one example is infinite, and whose joint products spoil its neighbours."""

        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

        def losses(self, stack: Tree, batch: Any) -> Tensor:
            losses = model.losses(stack, batch)
            bad = torch.tensor([length == items[1].needed for length in batch.lengths])
            return losses * torch.where(bad.any() & (bad | (len(bad) > 1)), torch.inf, 1.0)

    left = [item for item in items if item.needed != items[1].needed]
    assert len(left) == len(items) - 1
    found = delta(*run_work(work, [job(model, "anna")], Broken()))  # type: ignore[arg-type]
    expected = tree.scale(
        delta(*run_work(replace(work, batch_size=4), [job(model, "anna", examples=left)], model)), 4 / 5
    )
    assert tree.norm(tree.sub(found, expected)) < 1e-5 * tree.norm(expected)
    assert tree.norm(tree.sub(found, whole)) > 1e-2 * tree.norm(whole)


def test_opacus_has_the_same_clipped_sum() -> None:
    """A linear layer below a linear layer: per-example gradients by its hooks, clipped by its optimiser."""
    pytest.importorskip("opacus")
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    torch.manual_seed(0)
    inputs, targets = torch.randn(6, 5, dtype=torch.float64), torch.randint(0, 3, (6,))
    net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)).double()
    wrapped = GradSampleModule(net, loss_reduction="sum")
    inner = torch.optim.SGD(wrapped.parameters(), lr=1.0)
    theirs = DPOptimizer(inner, noise_multiplier=0.0, max_grad_norm=0.3, expected_batch_size=6, loss_reduction="sum")
    cross_entropy(wrapped(inputs), targets, reduction="sum").backward()
    rows = torch.cat([weight.grad_sample.reshape(6, -1) for weight in net.parameters()], 1)
    theirs.clip_and_accumulate()
    expected = torch.cat([weight.summed_grad.reshape(-1) for weight in net.parameters()])
    for grid in (False, True):
        clip, total = Clip(0.3, rows.shape[1], on_grid=grid), torch.zeros(rows.shape[1], dtype=torch.float64)
        clip.add(total, rows.clone())
        # Opacus adds 1e-6 to norms; the grid shrinks the clip by 1.2e-5 and rounds six values by half a step
        assert float((total * clip.unit - expected).norm()) < 5e-5 * float(expected.norm())
    assert float(rows.norm(dim=1).max()) > 0.3 > float(rows.norm(dim=1).min() / 10)


# the noise


def noise_of(work: DpSgd, model: LoadedModel, one: ClientJob) -> Tree:
    """What the noise has added to the gradient of a single step."""
    plain = replace(work, noise_multiplier=0.0)
    moved, still = (delta(*run_work(each, [one], model)) for each in (work, plain))
    return tree.sub(still, moved)


def test_the_noise_has_its_size_and_touches_every_tensor_alike() -> None:
    """Std z C / b; without examples there is nothing else. Of n values it is known to 1 / sqrt(2 n), here 0.2 %."""
    model, work = model_of(Lora(rank=32)), DpSgd(lr=1.0, steps=1, batch_size=3, clip=0.7, noise_multiplier=1.3)
    jobs, target = [private_job(model, client, examples=[]) for client in DATA], 1.3 * 0.7 / 3
    found = [delta(outcome) for outcome in run_work(work, jobs, model)]
    whole = torch.cat([leaf.reshape(-1) for moved in found for leaf in moved.values()])
    assert len(whole) > 1e5
    assert float(whole.std()) == pytest.approx(target, rel=0.01)
    assert abs(float(whole.mean())) < 4 * target / math.sqrt(len(whole))
    for name, leaf in found[0].items():
        assert float(leaf.std()) == pytest.approx(target, rel=5 / math.sqrt(2 * leaf.numel())), name


def test_the_noise_is_that_of_the_stream_on_the_grid() -> None:
    """Value by value: integers of the keyed stream, times a power of two of the clip, over the expected batch."""
    model, one = model_of(), private_job(model_of(), "anna", examples=[])
    work = DpSgd(lr=1.0, steps=1, batch_size=3, clip=0.5, noise_multiplier=1.0)
    seen: list[tuple[str, bytes]] = []

    class Source:
        def stream(self, purpose: str, digest: bytes) -> NoiseStream:
            seen.append((purpose, digest))
            return NoiseStream(derive(SECRET, purpose))

    one = replace(one, noise=Source())
    found = delta(*run_work(work, [one], model))
    assert [purpose for purpose, _ in seen] == ["dp_sgd/0/1.0"] and len(seen[0][1]) == 32
    size = sum(leaf.numel() for leaf in found.values())
    integers = NoiseStream(derive(SECRET, "dp_sgd/0/1.0")).discrete_gaussian(2.0**20, size)
    at = 0
    for name in sorted(found):
        leaf = found[name]
        expected = torch.from_numpy(integers[at : at + leaf.numel()]).double() * (0.5 * 2.0**-20 / 3)
        assert torch.allclose(-leaf.reshape(-1), expected, rtol=0, atol=1e-15)
        at += leaf.numel()


def test_the_same_round_repeats_its_noise_and_another_input_draws_its_own() -> None:
    model = model_of()
    one = private_job(model, "anna", examples=[])
    first = noise_of(NOISED, model, one)
    assert tree.equal(first, noise_of(NOISED, model, one))
    other = replace(one, initial=start(model, seed=1))
    later = replace(one, noise=Noise(ctx("anna", round=3)))
    more = private_job(model, "anna", examples=DATA["anna"][:1])
    ben = private_job(model, "ben", examples=[])
    secret = private_job(model, "anna", examples=[], key=bytes(32))
    for changed in (other, later, more, ben, secret):
        apart = tree.norm(
            tree.sub(noise_of(replace(NOISED, steps=1), model, changed), noise_of(replace(NOISED, steps=1), model, one))
        )
        assert apart > tree.norm(first) / 10


def test_steps_draw_noise_of_their_own() -> None:
    model, one = model_of(), private_job(model_of(), "anna", examples=[])
    work = DpSgd(lr=1.0, steps=2, batch_size=3, clip=0.5, noise_multiplier=1.0)
    both, first = (delta(*run_work(replace(work, steps=steps), [one], model)) for steps in (2, 1))
    second = tree.sub(both, first)
    pairs = torch.cat([torch.stack([first[n].reshape(-1), second[n].reshape(-1)]) for n in first], 1)
    assert abs(float(torch.corrcoef(pairs)[0, 1])) < 4 / math.sqrt(pairs.shape[1])
    assert float(second[min(second)].norm()) > 0


def test_an_empty_batch_takes_a_noisy_step() -> None:
    """Of a client that has examples: a coin may leave all of them out, which nobody may see."""
    model = model_of()
    work = DpSgd(lr=1.0, steps=40, batch_size=1, clip=0.5, noise_multiplier=1.0)
    one = private_job(model, "ben")
    empty = [step for step, chosen in enumerate(work.plan(len(DATA["ben"]), one.ctx)) if not chosen]
    assert 3 < len(empty) < 30  # (2/3)^3 = 0.3 of 40
    (outcome,) = run_work(work, [one], model)
    assert result(outcome)[1]["steps"] == 40
    nobody = private_job(model, "ben", examples=[])
    assert tree.norm(delta(*run_work(replace(work, steps=1), [nobody], model))) > 0
    without = replace(work, steps=1, noise_multiplier=0.0)
    assert tree.norm(delta(*run_work(without, [nobody], model))) == 0


def test_hooks_see_the_noised_gradient() -> None:
    model, seen = model_of(), []
    work = DpSgd(lr=1.0, steps=1, batch_size=3, clip=0.5, noise_multiplier=1.0)

    def hook(grads: Tree, params: Tree) -> Tree:
        seen.append({name: leaf.clone() for name, leaf in grads.items()})
        return tree.scale(grads, 0.5)

    one = replace(private_job(model, "anna", examples=[]), adjust=hook)
    found = delta(*run_work(work, [one], model))
    assert tree.norm(seen[0]) > 0
    assert tree.norm(tree.add(found, tree.scale(seen[0], 0.5))) < 1e-12 * tree.norm(found)


# the coins


def test_every_example_is_drawn_with_the_same_chance() -> None:
    """1e5 draws: 2,000 steps of 50 examples. Chi-square of how often each is in, and the law of the batch's size."""
    work, count, steps = DpSgd(lr=1.0, steps=2000, batch_size=10, noise_multiplier=0), 50, 2000
    plan = [[index for micro in step for index in micro] for step in work.plan(count, ctx("anna"))]
    times = np.bincount([index for chosen in plan for index in chosen], minlength=count)
    rate = 0.2
    square = float((((times - steps * rate) ** 2) / (steps * rate * (1 - rate))).sum())
    assert abs(square - count) < 2.58 * math.sqrt(2 * count)  # chi-square of 50 degrees of freedom: p > 0.01
    sizes = np.array([len(chosen) for chosen in plan])
    assert sizes.mean() == pytest.approx(10, abs=2.58 * math.sqrt(count * rate * (1 - rate) / steps))
    assert sizes.var() == pytest.approx(count * rate * (1 - rate), rel=2.58 * math.sqrt(2 / steps))
    together = sum(0 in chosen and 1 in chosen for chosen in plan) / steps  # two coins, not one
    assert together == pytest.approx(rate**2, abs=2.58 * math.sqrt(rate**2 / steps))


@pytest.mark.parametrize(("batch", "pieces", "largest"), [(6, 1, 6), (6, 2, 3), (7, 3, 3), (2, 5, 1)])
def test_micro_batches_bound_what_is_computed_at_once(batch: int, pieces: int, largest: int) -> None:
    work = DpSgd(lr=1.0, steps=30, batch_size=batch, accumulation=pieces, noise_multiplier=0)
    sizes = [[len(micro) for micro in step] for step in work.plan(20, ctx("anna"))]
    assert max(size for step in sizes for size in step) == largest and all(0 not in step for step in sizes)
    whole = [[i for micro in step for i in micro] for step in work.plan(20, ctx("anna"))]
    assert whole == [[i for m in s for i in m] for s in replace(work, accumulation=1).plan(20, ctx("anna"))]


def test_what_a_round_costs() -> None:
    work = DpSgd(lr=1.0, steps=7, batch_size=10, noise_multiplier=1.5)
    assert example_release(work, 40) == Release("example", 1.5, PoissonScheme(0.25), 7)
    assert example_release(work, 3).scheme == example_release(work, 0).scheme == PoissonScheme(1.0)
    small = work.for_profile(Profile(steps=2, batch_size=5))
    assert isinstance(small, DpSgd) and example_release(small, 40) == Release("example", 1.5, PoissonScheme(0.125), 2)


# what leaves the client, and what stops it


def test_nothing_leaves_but_the_change_of_the_weights() -> None:
    """A loss, or a number of tokens, would tell of the examples without noise."""
    model = model_of()
    update, _ = result(*run_work(NOISED, [private_job(model, "anna")], model))
    assert set(update.parts) == {"delta"} == NOISED.traits.makes


class Elsewhere(DpSgd):
    """The twin of opacus #820: the optimiser holds a copy of the weights, and the model reads the old ones."""

    def _optimizer(self, row: Tensor, grad: Tensor) -> torch.optim.Optimizer:
        return super()._optimizer(row.clone(), grad)


class Unplugged(DpSgd):
    """Its optimiser steps nothing."""

    def _optimizer(self, row: Tensor, grad: Tensor) -> torch.optim.Optimizer:
        made = super()._optimizer(row, grad)
        made.step = lambda: None  # type: ignore[assignment,method-assign,misc]
        return made


@pytest.mark.parametrize(("kind", "what"), [(Elsewhere, "lora_A has not moved"), (Unplugged, "lora_A has not moved")])
def test_a_first_step_that_moves_nothing_is_refused(kind: Callable[..., DpSgd], what: str) -> None:
    model = model_of()
    with pytest.raises(
        ClientError, match=f"client anna, first step of work.dp_sgd: .*{what}, so that privacy would be"
    ):
        run_work(kind(lr=0.3, steps=3, batch_size=2, noise_multiplier=1.0), [private_job(model, "anna")], model)


def test_an_optimiser_with_values_of_its_own_is_refused_even_if_the_weights_move() -> None:
    class Shadowed(DpSgd):
        def _client_step(self, carry: Carry, k: int, job: ClientJob, loss: float) -> None:
            super()._client_step(carry, k, job, loss)
            carry.optimizers[k].param_groups[0]["params"][0] = carry.values[k].clone()

    model = model_of()
    with pytest.raises(ClientError, match="the optimiser holds other values than the model reads"):
        run_work(Shadowed(lr=0.3, steps=3, batch_size=2, noise_multiplier=1.0), [private_job(model, "anna")], model)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_every_tensor_has_moved_after_one_step(optimizer: Any) -> None:
    model = model_of(dtype="float32")
    known = private_job(model, "anna")
    one = ClientJob(known.ctx, model.initial_params(KEY), DATA["anna"], noise=known.noise)  # lora_B is zero
    moved = delta(*run_work(replace(NOISED, optimizer=optimizer, steps=1), [one], model))
    assert all(bool((leaf != 0).all()) for leaf in moved.values())


def test_noise_without_a_source_is_refused() -> None:
    model = model_of()
    with pytest.raises(ConfigError, match=r"client anna: work.dp_sgd has no source of secret noise"):
        run_work(NOISED, [job(model, "anna")], model)
    with pytest.raises(ConfigError, match=r"noise_multiplier is not set; set it, or demands.privacy.target_epsilon"):
        run_work(replace(NOISED, noise_multiplier=None), [job(model, "anna")], model)
    with pytest.raises(ConfigError, match="noise_multiplier is not set"):
        example_release(replace(NOISED, noise_multiplier=None), 5)


def test_weights_that_are_not_finite_fail_by_name() -> None:
    model = model_of(dtype="float32")
    (outcome,) = run_work(replace(NOISED, lr=1e39, steps=2), [private_job(model, "anna")], model)
    assert outcome == "after step 2 its weights are not finite; lower work.dp_sgd.lr"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, "needs steps and takes no epochs, which tell how many examples a client has"),
        ({"epochs": 1}, "needs steps and takes no epochs"),
        ({"steps": 1, "clip_norm": 1.0}, "clip_norm bounds the mean of a batch, which hides no example; set .*clip"),
        ({"steps": 1, "clip": 0.0}, "work.dp_sgd.clip is 0.0; it must be 1e-30 to 1e"),
        ({"steps": 1, "clip": math.inf}, "clip is inf"),
        ({"steps": 1, "noise_multiplier": -1.0}, "noise_multiplier is -1.0; it must be 0, or 1e-06"),
        ({"steps": 1, "noise_multiplier": math.nan}, "noise_multiplier is nan"),
        ({"steps": 1, "batch_size": 0}, "work.dp_sgd.batch_size is 0"),
        ({"steps": 1, "lr": -1.0}, "work.dp_sgd.lr is -1.0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        DpSgd(**settings)


def test_a_baseline_takes_more_examples_and_no_more_memory() -> None:
    work = DpSgd(lr=0.1, steps=2, batch_size=4, accumulation=2, noise_multiplier=1.0).with_lr(lr=0.5, times=3)
    assert work == DpSgd(lr=0.5, steps=2, batch_size=12, accumulation=6, noise_multiplier=1.0)
    assert work.idle == "" and replace(work, lr=0).idle == "work.dp_sgd.lr is 0"
