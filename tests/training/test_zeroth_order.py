"""Training without gradients: the formula, no graph, directions that all draw alike, weights rebuilt from numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fedllm
from fedllm.data.shards import ClientOutage, Shards
from fedllm.engines.batched.engine import Batched
from fedllm.engines.serial import Serial
from fedllm.errors import CheckError, ConfigError
from fedllm.events import MessageSent
from fedllm.experiment.checks.check import check
from fedllm.messages.context import Profile, RoundContext
from fedllm.messages.update import Part, Update
from fedllm.models.batch import Example
from fedllm.models.loaded_model import load
from fedllm.rng import Key
from fedllm.runs.checkpoints import Checkpoints
from fedllm.stages.zeroth_order.seed_pool import SeedPool
from fedllm.tensors import directions as drawn
from fedllm.tensors import tree
from fedllm.tensors.directions import directions, replayed, seed_key
from fedllm.tensors.tree import Tree
from fedllm.training.base import ClientJob, run_work
from fedllm.training.zeroth_order import SCALARS, ZerothOrder
from tests.runs.small import events, spec, write_records

LEAVES = {"a.lora_A": (2, 5), "b.lora_B": (7, 2)}


class Bowl:
    """L_k(w) = 1/2 |w - c_k|², c_k the client's number; no text is looked at, and nobody may ask for a gradient."""

    device, why_not_stackable, shares_prefixes = "cpu", None, False

    def losses(self, stack: Tree, batch: Any) -> Tensor:
        assert not torch.is_grad_enabled()
        clients = torch.arange(len(batch.counts), dtype=torch.float64)
        away = [((leaf - clients.view(-1, *[1] * (leaf.dim() - 1))) ** 2).flatten(1).sum(1) for leaf in stack.values()]
        return 0.5 * torch.stack(away).sum(0)

    def initial_params(self, key: Key) -> Tree:
        return {}

    def worked_out(self, params: Tree, job: ClientJob) -> Tree:
        return {}


def start() -> Tree:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in LEAVES.items()}


def job(client: str, examples: int = 3, **profile: Any) -> ClientJob:
    one = Example(torch.arange(3), torch.tensor([-100, 1, 2]))
    return ClientJob(
        RoundContext(1, Key(5), 2, 2, client=client, profile=Profile(**profile)), start(), [one] * examples
    )


def test_on_a_bowl_a_step_is_the_inner_product_with_the_gradient() -> None:
    """The central difference of a quadratic is exact for every eps: w <- w - lr ((w - c) . z) z."""
    work = ZerothOrder(lr=0.03, steps=2, batch_size=1, eps=0.7, pool=9)
    outcomes = run_work(work, [job("a"), job("b", examples=2, lr=0.01)], Bowl())  # type: ignore[arg-type]
    for k, (client, lr) in enumerate((("a", 0.03), ("b", 0.01))):
        assert not isinstance(outcomes[k], str)
        update, facts = outcomes[k]
        w, choice, amounts = start(), job(client).ctx.rng("directions"), torch.zeros(9)
        for _ in range(2):
            seed = int(torch.randint(9, (1,), generator=choice))
            z = dict(directions(w, seed_key(seed)))
            slope = sum(float(((w[name] - k) * z[name]).sum()) for name in w)
            w = {name: leaf - lr * slope * z[name] for name, leaf in w.items()}
            amounts[seed] += lr * slope
        for name, leaf in update.parts["delta"].tree.items():
            assert float((leaf - (w[name] - start()[name])).abs().max()) < 1e-12
        assert torch.allclose(update.parts[SCALARS].tree["pool"].float(), amounts, atol=1e-6)
        assert facts["steps"] == 2 and facts["tokens"] == 2 * 2 * 3, "two passes over one example, twice"


def test_numbers_rebuild_what_a_client_came_to() -> None:
    work = ZerothOrder(lr=0.02, steps=6, batch_size=1, pool=4)
    (outcome,) = run_work(work, [job("a")], Bowl())  # type: ignore[arg-type]
    assert not isinstance(outcome, str)
    parts = outcome[0].parts
    found = replayed(start(), parts[SCALARS].tree["pool"])
    for name, leaf in tree.add(start(), parts["delta"].tree).items():
        assert float((found[name] - leaf).abs().max()) < 1e-5, "the numbers have six digits"


def test_a_large_difference_is_left_out_and_a_loss_that_is_not_finite_fails_its_client_alone() -> None:
    still = replace(ZerothOrder(lr=0.02, steps=2, batch_size=1), largest=1e-9)
    (outcome,) = run_work(still, [job("a")], Bowl())  # type: ignore[arg-type]
    assert not isinstance(outcome, str)
    assert tree.norm(outcome[0].parts["delta"].tree) < 1e-12
    lost = replace(job("a"), initial={name: leaf * torch.inf for name, leaf in start().items()})
    gone, stays = run_work(ZerothOrder(lr=0.02, steps=2), [lost, job("b")], Bowl())  # type: ignore[arg-type]
    (alone,) = run_work(ZerothOrder(lr=0.02, steps=2), [job("b")], Bowl())  # type: ignore[arg-type]
    assert isinstance(gone, str) and "its loss is not finite; lower work.zeroth_order.lr" in gone
    assert not isinstance(stays, str) and not isinstance(alone, str)


def test_what_a_joint_product_spoilt_is_asked_again_by_itself() -> None:
    class Joint(Bowl):
        """A loss that is not finite makes those of all others so."""

        def losses(self, stack: Tree, batch: Any) -> Tensor:
            found = super().losses(stack, batch)
            return found if bool(torch.isfinite(found).all()) else found * torch.nan

    lost = replace(job("a"), initial={name: leaf * torch.inf for name, leaf in start().items()})
    work = ZerothOrder(lr=0.02, steps=2, batch_size=1)
    gone, stays = run_work(work, [lost, job("b")], Joint())  # type: ignore[arg-type]
    others = run_work(work, [job("a"), job("b")], Joint())  # type: ignore[arg-type]
    assert isinstance(gone, str) and not isinstance(stays, str) and not isinstance(others[1], str)
    assert tree.norm(stays[0].parts["delta"].tree) > 0 and stays[1]["steps"] == others[1][1]["steps"] == 2


def test_both_passes_of_a_step_are_without_dropout() -> None:
    class Dropping(Bowl):
        def losses(self, stack: Tree, batch: Any) -> Tensor:
            assert not batch.dropout, "a mask of its own in each pass is noise in the difference"
            return super().losses(stack, batch)

    run_work(ZerothOrder(lr=0.02, steps=1, batch_size=1), [job("a"), job("b")], Dropping())  # type: ignore[arg-type]


def test_the_pool_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """z(0) = (1, 0), z(1) = (0, 1), w = (2, 4): one client with 2, 4 and one with 2, 1.8 at a rate of 0.1."""
    axes = {seed_key(0): torch.tensor([1.0, 0.0]), seed_key(1): torch.tensor([0.0, 1.0])}
    monkeypatch.setattr(drawn, "directions", lambda leaves, key: iter([("w", axes[key])]))
    stage, ctx, params = SeedPool(), RoundContext(0, Key(1), 2, 2), {"w": torch.tensor([2.0, 4.0])}
    mean = torch.tensor([0.1 * (0.5 * 2 + 0.5 * 3.8), 0.1 * 0.5 * 4])
    total, state = stage.decode(Update({"delta": Part({"pool": mean}, 1.0)}), params, {}, ctx)
    assert torch.allclose(params["w"] + total.parts["delta"].tree["w"], torch.tensor([1.71, 3.8]))
    assert torch.equal(state["pool"], mean)


def test_the_mean_of_many_steps_points_along_the_gradient() -> None:
    """Of d = 28 values and n = 2000 directions the cosine is about sqrt(n / (n + d)); by chance it is 0.19."""
    w, found = start(), torch.zeros(24, dtype=torch.float64)
    for seed in range(2000):
        z = torch.cat([leaf.flatten() for _, leaf in directions(w, seed_key(seed))])
        gradient = torch.cat([w[name].flatten() for name in sorted(w)])
        found += (gradient @ z) * z
    assert float(torch.cosine_similarity(found, gradient, dim=0)) > 0.98


REBUILD = """
import sys, torch
from fedllm.tensors import tree
from fedllm.tensors.directions import replayed
start = {"b": torch.linspace(-1, 1, 35).reshape(5, 7), "a": torch.ones(3, dtype=torch.float16)}
print(tree.digest(replayed(start, torch.tensor([0.5, 0.0, -0.125, 3e-3]))))
"""


def test_two_processes_rebuild_the_same_bits() -> None:
    told = subprocess.run([sys.executable, "-c", REBUILD], capture_output=True, text=True, check=True).stdout
    begin = {"a": torch.ones(3, dtype=torch.float16), "b": torch.linspace(-1, 1, 35).reshape(5, 7)}
    here = tree.digest(replayed(begin, torch.tensor([0.5, 0.0, -0.125, 3e-3])))
    assert told == here + "\n"


def experiment(folder: Path, method: str = "fedkseed", rounds: int = 4, *, full: bool = False, **work: Any) -> Any:
    made = spec(write_records(folder / "people.jsonl"), rounds=rounds, evaluation__every=None)
    del made["stages"]
    made["method"] = method
    made["task"]["adapter"] = "full" if full else made["task"]["adapter"]
    pool = {} if method == "fedmezo" else {"pool": 16, "shared": method == "decomfl"}
    settings = {"lr": 1e-4, "steps": 3, "batch_size": 2, "max_length": 48, **pool, **work}
    return fedllm.build({**made, "work": {"zeroth_order": settings}})


def test_after_many_rounds_with_losses_everybody_has_the_same_weights(tmp_path: Path) -> None:
    """One client is there from the last round on alone, one is lost now and then: numbers alone bring both along."""
    made = experiment(tmp_path, rounds=20, full=True, steps=1)
    assert isinstance(made.federation, Shards)
    lost = (*(ClientOutage("cid", round) for round in range(19)), *(ClientOutage("ben", round) for round in (2, 3, 7)))
    made = replace(made, federation=replace(made.federation, failures=lost))
    result = fedllm.run(made, engine=Serial(), out=tmp_path / "run")
    state = Checkpoints(tmp_path / "run" / "checkpoints", 9).load(20)
    assert state is not None
    pool = state.states[0]["pool"]
    assert int((pool != 0).sum()) > 8
    rebuilt = replayed(load(made.task).initial_params(made.key), pool)
    off = max(float((leaf - state.params[name]).abs().max()) for name, leaf in rebuilt.items())
    assert off < 1e-8, "the rounding of one sum: weights are below 0.1 here, whose digits end at 7e-9"
    down = [event.bytes for event in events(result.folder) if isinstance(event, MessageSent) and event.call == "work"]
    assert max(down) < 2000, "a late client is sent what the others are sent"


def test_it_learns(tmp_path: Path) -> None:
    result = fedllm.run(
        experiment(tmp_path, rounds=2, full=True, steps=20, pool=64), engine=Serial(), out=tmp_path / "run"
    )
    scores = result.summary["eval"]
    assert scores["federated"]["nll"] < scores["base"]["nll"] - 0.1


def test_shared_directions_average_the_losses(tmp_path: Path) -> None:
    """The mean of the clients' numbers along one z is the number of their mean loss; no seed is used twice."""
    work = ZerothOrder(lr=0.03, steps=1, batch_size=1, pool=12, shared=True)
    outcomes = run_work(work, [job("a"), job("b")], Bowl())  # type: ignore[arg-type]
    numbers = [outcome[0].parts[SCALARS].tree["pool"] for outcome in outcomes if not isinstance(outcome, str)]
    z = dict(directions(start(), seed_key(1)))  # round 1, step 0
    slope = sum(
        float(((start()[name] - 0.5) * z[name]).sum()) for name in z
    )  # the mean of both bowls has its middle at 1/2
    mean = (numbers[0] + numbers[1]) / 2
    assert float(mean[1]) == pytest.approx(0.03 * slope, rel=1e-6) and int((mean != 0).sum()) == 1
    made = experiment(tmp_path, "decomfl", rounds=3, steps=4, lr=0.01, pool=12, shared=True)
    fedllm.run(made, engine=Serial(), out=tmp_path / "run")
    state = Checkpoints(tmp_path / "run" / "checkpoints", 9).load(3)
    assert state is not None and int((state.states[0]["pool"] != 0).sum()) == 12
    with pytest.raises(ConfigError, match="a client's profile has 3 steps"):
        work.for_profile(Profile(steps=3))


@pytest.mark.parametrize("method", ["fedkseed", "fedmezo", "decomfl"])
def test_a_stack_is_its_clients_one_by_one(method: str, tmp_path: Path) -> None:
    found = {}
    for name, engine in (("serial", Serial()), ("batched", Batched(stack=3, workers=1))):
        made = experiment(tmp_path, method, rounds=2, steps=4, lr=0.01)
        found[name] = fedllm.run(made, engine=engine, out=tmp_path / name).params
    moved = tree.norm(tree.sub(found["serial"], load(made.task).initial_params(made.key)))
    assert moved > 0.05 and tree.norm(tree.sub(found["serial"], found["batched"])) < 0.01 * moved


def test_all_weights_take_18_kb_a_round(tmp_path: Path) -> None:
    """4,096 seeds down, and at most 200 numbers with their places up, whatever the model's size."""
    made = experiment(tmp_path, rounds=2, steps=200, pool=4096, batch_size=1, lr=1e-6)
    result = fedllm.run(made, engine=Batched(stack=3, workers=1), out=tmp_path / "run")
    sizes: dict[tuple[int, str], int] = {}
    for event in events(result.folder):
        if isinstance(event, MessageSent) and event.call == "work":
            key = (event.round, event.client)
            sizes[key] = sizes.get(key, 0) + event.bytes
    assert len(sizes) == 6 and max(sizes.values()) <= 18 * 1024 + 1024, "and the headers of two messages"
    assert max(sizes.values()) > 17_000, "the second round sends the whole pool"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"steps": 1, "epochs": 1}, "exactly one of steps and epochs"),
        ({"steps": 1, "eps": 0.0}, "eps is 0.0; it must be above 0"),
        ({"steps": 1, "pool": 0}, "pool is 0; it must be positive"),
        ({"epochs": 1, "pool": 4, "shared": True}, "shared needs a pool and steps"),
        ({"steps": 1, "lr": -1.0}, "lr is -1.0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        ZerothOrder(**settings)


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    made = experiment(tmp_path)
    with pytest.raises(CheckError, match="'scalars'"):
        check(replace(made, work=replace(made.work, pool=None)))
    whole = json.loads(json.dumps(spec(tmp_path / "people.jsonl")))
    del whole["stages"]
    with pytest.raises(ConfigError, match="fedkseed needs the work zeroth_order, but the file sets work to sgd"):
        fedllm.build({**whole, "method": "fedkseed"})
    with pytest.raises(CheckError, match=r"prox changes the gradients .* but work zeroth_order uses none"):
        check(replace(experiment(tmp_path, "fedmezo"), stages=fedllm.build({**whole, "method": "fedprox"}).stages))
