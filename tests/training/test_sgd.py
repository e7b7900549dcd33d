"""Local descent: a textbook loop in transformers, peft and torch.optim; stacks of clients; who touches whose bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from fedllm.errors import ConfigError
from fedllm.messages.context import Profile, RoundContext
from fedllm.messages.update import Update
from fedllm.models.adapters.base import Adapter
from fedllm.models.adapters.lora import Lora
from fedllm.models.adapters.soft_prompt import SoftPrompt
from fedllm.models.adapters.weights import Full
from fedllm.models.base_models.load import load_base
from fedllm.models.batch import IGNORE, Example, collate
from fedllm.models.loaded_model import LoadedModel, load
from fedllm.models.task import Task
from fedllm.rng import Key
from fedllm.tensors import tree
from fedllm.tensors.tree import Tree
from fedllm.training.base import ClientFacts, ClientJob, Outcome, Work, run_work
from fedllm.training.lr_schedule import LrSchedule
from fedllm.training.sgd import Sgd

KEY = Key(5)
LORA = Lora(rank=4, targets=("q_proj", "down_proj"))
WORKS = {
    "sgd": Sgd(lr=0.3, steps=3, batch_size=2),
    "momentum": Sgd(lr=0.1, steps=4, batch_size=2, momentum=0.9, weight_decay=0.1),
    "adamw": Sgd("adamw", lr=0.01, steps=3, batch_size=2, weight_decay=0.5, betas=(0.8, 0.95), eps=1e-6),
    "accumulation": Sgd(lr=0.3, steps=3, batch_size=2, accumulation=3),
    "epochs": Sgd("adamw", lr=0.01, epochs=2, batch_size=2),
    "ragged epochs": Sgd(lr=0.2, epochs=2, batch_size=2, accumulation=2),
    "clipping": Sgd(lr=0.3, steps=3, batch_size=2, clip_norm=0.05),
    "schedule": Sgd(lr=0.3, steps=5, batch_size=2, lr_schedule=LrSchedule("cosine", warmup=2, floor=0.1)),
}


def test_suited_to_a_device() -> None:
    work = Sgd("adamw", lr=0.1, epochs=3, batch_size=4, accumulation=2, clip_norm=1.0)
    assert work.for_profile(Profile()) == work == work.for_profile(Profile(rank=2, device="phone"))
    assert work.for_profile(Profile(steps=5)) == replace(work, steps=5, epochs=None)
    assert work.for_profile(Profile(batch_size=1, lr=0.0)) == replace(work, batch_size=1, lr=0.0)
    whole = replace(work, epochs=None, steps=7).for_profile(Profile(steps=0, batch_size=2, lr=0.5))
    assert whole == Sgd("adamw", lr=0.5, steps=0, batch_size=2, accumulation=2, clip_norm=1.0)
    assert whole.num_steps(100) == 0 and work.for_profile(Profile(steps=5)).num_steps(100) == 5


def test_another_work_is_the_same_on_every_device() -> None:
    work = Work()
    assert work.for_profile(Profile(steps=5, batch_size=1, lr=0.5)) is work


def model_of(adapter: Adapter = LORA, dtype: str = "float64") -> LoadedModel:
    return load(Task("tiny-llama", adapter=adapter, dtype=dtype))  # type: ignore[arg-type]


def ctx(client: str, **facts: Any) -> RoundContext:
    return RoundContext(
        **{"round": 2, "rounds": 4, "key": KEY, "cohort": 2, "population": 2, "client": client, **facts}
    )


def example(length: int, seed: int, labels: int = 3) -> Example:
    """Random tokens, of which the last are labelled."""
    tokens = torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed))
    targets = tokens.roll(-1)
    targets[-1] = IGNORE
    targets[: max(0, length - 1 - labels)] = IGNORE
    return Example(tokens, targets)


DATA: dict[str, list[Example]] = {  # unequal numbers and lengths
    "anna": [example(length, seed) for seed, length in enumerate((5, 9, 6, 7, 8))],
    "ben": [example(length, 50 + seed) for seed, length in enumerate((10, 4, 6))],
    "carl": [example(4 + seed, 90 + seed) for seed in range(9)],
}


def start(model: LoadedModel, seed: int = 0) -> Tree:
    """Weights in the middle of a run: no factor is zero."""
    generator = torch.Generator().manual_seed(seed)
    return {
        n: leaf + 0.05 * torch.randn(leaf.shape, generator=generator) for n, leaf in model.initial_params(KEY).items()
    }


def job(model: LoadedModel, client: str, *, examples: Sequence[Example] | None = None, **facts: Any) -> ClientJob:
    data = DATA[client] if examples is None else examples
    return ClientJob(ctx(client, **facts), start(model), data, lambda grads, params: grads)


def result(outcome: Outcome) -> tuple[Update, ClientFacts]:
    assert not isinstance(outcome, str), outcome
    return outcome


def delta(outcome: Outcome) -> Tree:
    return dict(result(outcome)[0].parts["delta"].tree)


# a textbook loop


def permuted(count: int, client: str, steps: int, size: int, ragged: bool) -> list[list[int]]:
    """The examples of each step: permutations one after another, in pieces of `size`."""
    generator = ctx(client).rng("batches")
    chosen: list[list[int]] = []
    stream: list[int] = []
    while len(chosen) < steps:
        stream += torch.randperm(count, generator=generator).tolist()
        while len(stream) >= size:
            chosen.append(stream[:size])
            stream = stream[size:]
        if ragged and stream:
            chosen.append(stream)
            stream = []
    return chosen[:steps]


def textbook(work: Sgd, model: LoadedModel, client: str, factors: Sequence[float]) -> tuple[Tree, float]:
    """transformers, peft, torch.optim and one sequence at a time."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    other: Any = get_peft_model(load_base("tiny-llama", dtype="float64").model, config)
    names = {
        name.removeprefix("base_model.model.").removesuffix(".default.weight"): value
        for name, value in other.named_parameters()
        if value.requires_grad
    }
    begin = start(model)
    with torch.no_grad():
        for name, value in names.items():
            value.copy_(begin[name])
    leaves = list(names.values())
    if work.optimizer == "adamw":
        kind: Any = torch.optim.AdamW(
            leaves, lr=work.lr, betas=work.betas, eps=work.eps, weight_decay=work.weight_decay, foreach=False
        )
    else:
        kind = torch.optim.SGD(
            leaves, lr=work.lr, momentum=work.momentum, weight_decay=work.weight_decay, foreach=False
        )
    data, size, total = DATA[client], work.batch_size * work.accumulation, 0.0
    for factor, chosen in zip(
        factors, permuted(len(data), client, len(factors), size, work.epochs is not None), strict=True
    ):
        losses = []
        for index in chosen:
            logits = other(input_ids=data[index].tokens[None]).logits[0]
            losses.append(cross_entropy(logits, data[index].targets, ignore_index=IGNORE))
        loss = torch.stack(losses).mean()
        kind.zero_grad()
        loss.backward()
        if work.clip_norm is not None:
            norm = math.sqrt(sum(float(leaf.grad.square().sum()) for leaf in leaves))
            for leaf in leaves:
                leaf.grad *= min(1.0, work.clip_norm / norm)
        for group in kind.param_groups:
            group["lr"] = work.lr * factor
        kind.step()
        total += float(loss.detach())
    return {name: value.detach() - begin[name] for name, value in names.items()}, total / len(factors)


COSINE = [1 / 2, 1, 1, 0.1 + 0.9 * (1 + math.cos(math.pi / 3)) / 2, 0.1 + 0.9 * (1 + math.cos(2 * math.pi / 3)) / 2]
FACTORS = {"sgd": [1.0] * 3, "momentum": [1.0] * 4, "adamw": [1.0] * 3, "accumulation": [1.0] * 3}
FACTORS |= {"clipping": [1.0] * 3, "schedule": COSINE}
FACTORS |= {"epochs": [1.0] * 2 * 3, "ragged epochs": [1.0] * 2 * 2}  # 5 examples: 2 + 2 + 1, and 4 + 1


@pytest.mark.parametrize("name", WORKS)
def test_one_client_is_a_textbook_loop(name: str) -> None:
    model, work = model_of(), WORKS[name]
    (outcome,) = run_work(work, [job(model, "anna")], model)
    expected, loss = textbook(work, model, "anna", FACTORS[name])
    update, facts = result(outcome)
    assert tree.norm(tree.sub(delta(outcome), expected)) < 1e-9 * tree.norm(expected)
    assert float(update.parts["metrics"].tree["loss"]) == pytest.approx(loss, rel=1e-10)
    assert facts["steps"] == len(FACTORS[name])
    assert facts["lr_sum"] == pytest.approx(work.lr * sum(FACTORS[name]), rel=1e-12)


def test_counts_are_what_was_trained_on() -> None:
    model = model_of()
    (outcome,) = run_work(Sgd(lr=0.1, epochs=2, batch_size=2), [job(model, "anna")], model)
    update, facts = result(outcome)
    tokens = 2 * sum(len(item.tokens) for item in DATA["anna"])
    assert facts["tokens"] == tokens and update.parts["counts"].weight == 0
    counts = {name: float(leaf) for name, leaf in update.parts["counts"].tree.items()}
    assert counts == {"steps": 6, "tokens": tokens, "computed": tokens - 2 * len(DATA["anna"])}  # last tokens
    assert set(update.parts) == Sgd(lr=0.1, steps=1).traits.makes


# stacks of clients


@pytest.mark.parametrize(
    "adapter", [LORA, Lora(rank=4, dropout=0.3), SoftPrompt(tokens=2)], ids=["lora", "drop", "soft"]
)
@pytest.mark.parametrize("name", WORKS)
def test_a_stack_is_its_clients_one_by_one(name: str, adapter: Adapter) -> None:
    model = model_of(adapter)
    jobs = [job(model, client) for client in DATA]
    together = run_work(WORKS[name], jobs, model)
    for one, outcome in zip(jobs, together, strict=True):
        (alone,) = run_work(WORKS[name], [one], model)
        expected = delta(alone)
        assert tree.norm(tree.sub(delta(outcome), expected)) < 1e-9 * tree.norm(expected)
        (update, facts), (other, same) = result(outcome), result(alone)
        assert facts == same
        losses = [float(found.parts["metrics"].tree["loss"]) for found in (update, other)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert tree.norm(tree.sub(delta(together[0]), delta(together[1]))) > 0.1 * tree.norm(delta(together[0]))


def test_the_start_is_left_as_it_was() -> None:
    model = model_of()
    one = job(model, "anna")
    before = {name: leaf.clone() for name, leaf in one.initial.items()}
    run_work(WORKS["adamw"], [one], model)
    assert tree.equal(one.initial, before) and not any(leaf.requires_grad for leaf in one.initial.values())


@pytest.mark.parametrize("name", ["sgd", "adamw", "clipping"])
def test_a_clients_data_changes_no_bit_of_another(name: str) -> None:
    model = model_of(dtype="float32")
    other = [example(len(item.tokens), 200 + place) for place, item in enumerate(DATA["ben"])]
    clients = [job(model, "anna"), job(model, "ben"), job(model, "carl")]
    changed = [clients[0], job(model, "ben", examples=other), clients[2]]
    before, after = run_work(WORKS[name], clients, model), run_work(WORKS[name], changed, model)
    for k in (0, 2):
        assert tree.equal(delta(before[k]), delta(after[k]))
    assert not tree.equal(delta(before[1]), delta(after[1]))


@pytest.mark.parametrize("name", ["sgd", "adamw", "accumulation"])
def test_a_client_whose_weights_are_nan_fails_alone(name: str) -> None:
    model = model_of(dtype="float32")
    clients = [job(model, client) for client in DATA]
    broken = {n: torch.full_like(leaf, math.nan) for n, leaf in clients[1].initial.items()}
    spoilt = [clients[0], ClientJob(clients[1].ctx, broken, clients[1].examples, clients[1].adjust), clients[2]]
    before, after = run_work(WORKS[name], clients, model), run_work(WORKS[name], spoilt, model)
    assert after[1] == "at step 0 its loss is nan; lower work.sgd.lr or set work.sgd.clip_norm"
    for k in (0, 2):
        assert tree.equal(delta(before[k]), delta(after[k]))


def test_a_client_that_diverges_fails_alone_and_says_at_which_step() -> None:
    """Its hook multiplies the gradient; the other client's bits are those of a run beside a client that is well."""
    model, work = model_of(dtype="float32"), Sgd(lr=0.1, steps=4, batch_size=2)
    anna, ben = job(model, "anna"), job(model, "ben")
    wild = ClientJob(ben.ctx, ben.initial, ben.examples, lambda grads, params: tree.scale(grads, 1e30))
    before, after = run_work(work, [anna, ben], model), run_work(work, [anna, wild], model)
    assert after[1] == "at step 1 its loss is nan; lower work.sgd.lr or set work.sgd.clip_norm"
    assert tree.equal(delta(before[0]), delta(after[0]))
    (last,) = run_work(Sgd(lr=1e30, steps=1, batch_size=2), [wild], model)
    assert last == "after step 1 its weights are not finite; lower work.sgd.lr or set work.sgd.clip_norm"


def test_clients_without_examples_or_steps_stand_still() -> None:
    model = model_of()
    for work, examples in ((Sgd(steps=3), []), (Sgd(epochs=3), []), (Sgd(steps=0), DATA["anna"])):
        nobody, ben = run_work(work, [job(model, "anna", examples=examples), job(model, "ben")], model)
        update, facts = result(nobody)
        assert not any(leaf.any() for leaf in update.parts["delta"].tree.values())
        assert facts == {"steps": 0, "lr_sum": 0.0, "tokens": 0, "computed": 0}
        moved = any(bool(leaf.any()) for leaf in delta(ben).values())
        assert moved is (work.steps != 0)


def test_hooks_see_a_clients_own_gradient_and_weights_before_clipping() -> None:
    model, seen = model_of(), []

    def hook(grads: Tree, params: Tree) -> Tree:
        seen.append((tree.norm(grads), {name: leaf.clone() for name, leaf in params.items()}))
        return tree.scale(grads, 0.0)

    clients = [job(model, "anna"), job(model, "ben")]
    clients[1] = ClientJob(clients[1].ctx, clients[1].initial, clients[1].examples, hook)
    _, held = run_work(WORKS["clipping"], clients, model)
    assert len(seen) == 3 and all(norm > 0.05 for norm, _ in seen)
    assert all(tree.equal(params, clients[1].initial) for _, params in seen)
    assert not any(leaf.any() for leaf in delta(held).values())


def test_an_example_counts_the_same_whatever_its_length() -> None:
    """Its gradient in a batch of two is half of its gradient alone: the lengths of examples do not couple."""
    model, work = model_of(), Sgd(lr=1.0, steps=1, batch_size=2)
    short, long = example(4, 1, labels=1), example(40, 2, labels=30)
    one, two = (delta(*run_work(work, [job(model, "anna", examples=[item] * 2)], model)) for item in (short, long))
    both = delta(*run_work(work, [job(model, "anna", examples=[short, long])], model))
    assert tree.norm(tree.sub(both, tree.scale(tree.add(one, two), 0.5))) < 1e-12 * tree.norm(both)


def test_full_weights_are_trained_one_client_at_a_time() -> None:
    """One step of plain SGD is minus lr times the gradient of the tied model."""
    model, base = model_of(Full()), load_base("tiny-llama", dtype="float64").model.requires_grad_(True)
    one = ClientJob(ctx("anna"), model.initial_params(KEY), DATA["anna"][:1], lambda grads, params: grads)
    (outcome,) = run_work(Sgd(lr=0.5, steps=1, batch_size=1), [one], model)
    item = DATA["anna"][0]
    cross_entropy(base(item.tokens[None]).logits[0], item.targets, ignore_index=IGNORE).backward()
    for name, leaf in delta(outcome).items():
        assert torch.allclose(leaf, -0.5 * base.get_parameter(name).grad, atol=1e-13)


def test_a_16_bit_base_trains() -> None:
    model = model_of(dtype="bfloat16")
    moved = delta(*run_work(Sgd("adamw", lr=0.01, epochs=8, batch_size=5), [job(model, "anna")], model))
    begin, batch = start(model), collate([DATA["anna"]])
    before, after = (model.losses(tree.stack([params]), batch) for params in (begin, tree.add(begin, moved)))
    assert float(after) < float(before) - 0.5


# which examples


@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_an_epoch_takes_every_example_once(count: int, batch_size: int, accumulation: int, epochs: int) -> None:
    work = Sgd(epochs=epochs, batch_size=batch_size, accumulation=accumulation)
    steps = list(work.plan(count, ctx("anna")))
    assert len(steps) == work.num_steps(count) == epochs * math.ceil(count / (batch_size * accumulation))
    each = len(steps) // epochs
    for epoch in range(epochs):
        micro = [batch for step in steps[epoch * each : (epoch + 1) * each] for batch in step]
        assert sorted(index for batch in micro for index in batch) == list(range(count))
        assert all(1 <= len(batch) <= batch_size for batch in micro)
    assert all(len(step) <= accumulation for step in steps)


@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 3), st.integers(0, 6))
def test_steps_are_whole_and_take_every_example_equally_often(
    count: int, batch_size: int, accumulation: int, steps: int
) -> None:
    plan = list(Sgd(steps=steps, batch_size=batch_size, accumulation=accumulation).plan(count, ctx("anna")))
    assert [[len(batch) for batch in step] for step in plan] == [[batch_size] * accumulation] * steps
    drawn = [index for step in plan for batch in step for index in batch]
    for at in range(0, len(drawn) - count + 1, count):
        assert sorted(drawn[at : at + count]) == list(range(count))


def test_the_order_is_keyed_by_run_round_and_client() -> None:
    work = Sgd(epochs=1, batch_size=50)

    def order(client: str = "anna", **facts: Any) -> Any:
        return list(work.plan(50, ctx(client, **facts)))

    assert order() == order() == order(slot=1, cohort=9)  # not by who else is there
    assert len({str(o) for o in (order(), order("ben"), order(round=3), order(key=Key(6)))}) == 4


# the learning rate


def test_a_schedule_by_hand() -> None:
    def factors(schedule: LrSchedule, steps: int, round: int = 0, rounds: int = 1) -> list[float]:
        return [schedule.factor(step=k, steps=steps, round=round, rounds=rounds) for k in range(steps)]

    assert factors(LrSchedule(), 3) == [1, 1, 1]
    assert factors(LrSchedule(warmup=2), 4) == [0.5, 1, 1, 1]
    assert factors(LrSchedule("linear"), 4) == [1, 0.75, 0.5, 0.25]
    assert factors(LrSchedule("linear", warmup=2, floor=0.2), 6) == pytest.approx([0.5, 1, 1, 0.8, 0.6, 0.4])
    half = math.sqrt(0.5)
    assert factors(LrSchedule("cosine"), 4) == pytest.approx([1, (1 + half) / 2, 0.5, (1 - half) / 2])
    over = LrSchedule("linear", over="run")
    assert [factors(over, 2, round=k, rounds=2) for k in range(2)] == [[1, 0.75], [0.5, 0.25]]


def test_a_schedule_over_the_run_reaches_the_optimiser() -> None:
    """Round 2 of 4 with 2 steps: steps 4 and 5 of 8."""
    model = model_of()
    work = Sgd(lr=1.0, steps=2, batch_size=2, lr_schedule=LrSchedule("linear", over="run"))
    _, facts = result(*run_work(work, [job(model, "anna")], model))
    assert facts["lr_sum"] == (1 - 4 / 8) + (1 - 5 / 8)


# settings


def test_the_rule_names_the_optimiser_for_the_stages() -> None:
    assert [work.rule for work in (Sgd(steps=1), Sgd(steps=1, momentum=0.9), Sgd("adamw", steps=1))] == [
        "sgd",
        "momentum",
        "adamw",
    ]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, "exactly one of steps and epochs"),
        ({"steps": 1, "epochs": 1}, "exactly one of steps and epochs"),
        ({"steps": -1}, "steps is -1"),
        ({"epochs": 0}, "epochs is 0; it must be positive"),
        ({"steps": 1, "batch_size": 0}, "batch_size is 0"),
        ({"steps": 1, "accumulation": 0}, "accumulation is 0"),
        ({"steps": 1, "max_length": 0}, "max_length is 0"),
        ({"steps": 1, "lr": math.nan}, "lr is nan; it must be 0 or more and finite"),
        ({"steps": 1, "lr": -1.0}, "lr is -1.0"),
        ({"steps": 1, "weight_decay": math.inf}, "weight_decay is inf"),
        ({"steps": 1, "clip_norm": 0.0}, "clip_norm is 0, which lets nothing train; null is no clipping"),
        ({"steps": 1, "clip_norm": -1.0}, "clip_norm is -1.0"),
        ({"steps": 1, "betas": (0.9, 1.0)}, "betas is .*; both must be in"),
        ({"steps": 1, "optimizer": "adamw", "momentum": 0.9}, "momentum belongs to optimizer sgd"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        Sgd(**settings)
