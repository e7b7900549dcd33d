"""SLoRA: what travels before and after the switch, the best factors, a model that does not change, on every engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedllm.data.partitioners.by import By
from fedllm.data.shards import ClientOutage, Shards
from fedllm.engines.serial import Serial
from fedllm.errors import CheckError, ConfigError
from fedllm.events import Event, MessageSent
from fedllm.experiment.checks.check import check, check_profiles
from fedllm.experiment.record import Experiment, Limits
from fedllm.messages.context import Profile, RoundContext
from fedllm.messages.update import Part, Update
from fedllm.models.adapters.lora import Lora
from fedllm.models.adapters.sparse_lora import SparseLora
from fedllm.models.base_models.load import materialise
from fedllm.models.loaded_model import LoadedModel, load
from fedllm.rng import Key
from fedllm.runs import launch
from fedllm.runs.checkpoints import Checkpoints
from fedllm.runs.export import export
from fedllm.runs.loaded_run import open_run
from fedllm.runs.state import ServerState
from fedllm.stages.base import Stage
from fedllm.stages.lora.sparse_first import SparseFirst
from fedllm.stages.personalization.keep import Keep
from fedllm.stages.server_optimizers.momentum import Momentum
from fedllm.stages.weighting.by_examples import ByExamples
from fedllm.stages.weighting.uniform import Uniform
from fedllm.tensors import low_rank, sparse_mask, tree
from fedllm.tensors.base_delta import BaseDelta
from fedllm.tensors.tree import Tree
from tests.engines.cohort import experiment, in_pieces, write_records
from tests.stages.lora.one_round import off

TOKENS = torch.tensor([[5, 9, 2, 7, 3]])
SIZES = {"q_proj": (64, 64), "down_proj": (64, 192)}  # of tiny-llama's layers, out and in
DENSITY, RANK = 0.05, 4
ADAPTER = SparseLora(rank=RANK, alpha=8, targets=tuple(SIZES), density=DENSITY)
COUNTS = [round(DENSITY * n * m) for n, m in SIZES.values() for _ in range(2)]  # two decoder layers
FACTORS = [RANK * (n + m) for n, m in SIZES.values() for _ in range(2)]

# The switch itself.


def switched(stage: SparseFirst, size: tuple[int, int] = (192, 576)) -> tuple[Tensor, Tree, Tree]:
    """The sparse sum before, the server's leaves after, and what joins the frozen weights, of one layer."""
    size_out, size_in = size
    start, moved = (torch.randn(900, generator=torch.Generator().manual_seed(k), dtype=torch.float64) for k in (1, 2))
    params = {
        "w.lora_sparse": start,
        **low_rank.layer_leaves("w", torch.zeros(size_out, 8).double(), torch.ones(8, size_in).double()),
    }
    total = Update({"delta": Part({"w.lora_sparse": moved}, 3.0)})
    after, _ = stage.decode(total, params, {}, RoundContext(stage.rounds - 1, Key(0), 2, 2))
    left = after.parts["base_delta"].tree if "base_delta" in after.parts else {}
    return sparse_mask.scatter("w", start + moved, size), tree.add(params, after.parts["delta"].tree), left


@pytest.mark.parametrize("size", [(192, 576), (576, 192)])
def test_the_factors_are_the_best_of_their_rank(size: tuple[int, int]) -> None:
    whole, after, _ = switched(SparseFirst(rounds=3), size)
    u, s, v = torch.linalg.svd(whole, full_matrices=False)
    b, a = low_rank.pair(after, "w")
    assert off(b @ a, (u[:, :8] * s[:8]) @ v[:8]) < 1e-9
    assert float((whole - b @ a).norm()) == pytest.approx(float(s[8:].norm())), "Eckart and Young"
    assert torch.allclose(b.norm(dim=0), s[:8].sqrt()) and torch.allclose(a.norm(dim=1), s[:8].sqrt())


def test_what_the_factors_cannot_hold_joins_the_frozen_weights() -> None:
    whole, after, left = switched(SparseFirst(rounds=3))
    b, a = low_rank.pair(after, "w")
    assert off(b @ a + BaseDelta({3: left}).dense("w"), whole) < 1e-12
    assert not after["w.lora_sparse"].any()
    assert {name: leaf.shape for name, leaf in left.items()} == {
        "w.lora_sparse": (900,),
        "w.lora_B": (192, 8),
        "w.lora_A": (8, 576),
    }
    assert switched(SparseFirst(rounds=3, leftover="dropped"))[2] == {}


def test_another_round_is_no_switch() -> None:
    params = {"w.lora_sparse": torch.ones(3), **low_rank.layer_leaves("w", torch.zeros(4, 1), torch.ones(1, 6))}
    total = Update({"delta": Part({"w.lora_sparse": torch.ones(3)}, 1.0)})
    for round in (0, 2):
        assert SparseFirst(rounds=2).decode(total, params, {}, RoundContext(round, Key(0), 1, 1)) == (total, {})


# Whole runs.

STAGES = (SparseFirst(rounds=2), ByExamples())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("data") / "people.jsonl")


def made(data: Path, stages: Sequence[Stage] = STAGES, *, lost: Sequence[ClientOutage] = (), **settings) -> Experiment:
    federation = Shards(str(data), partition=By("who"), heldout=0.3, failures=tuple(lost))
    settings = {"rounds": 4, "adapter": ADAPTER, "limits": Limits(keep_last=9), **settings}
    return experiment(data, stages=tuple(stages), federation=federation, **settings)


def logits(model: LoadedModel, run: ServerState) -> Tensor:
    """As the clients compute after a round."""
    stack = {**model.with_base_delta(run.base_delta).constants, **run.params}
    return model.adapter.logits(stack, TOKENS, torch.ones_like(TOKENS), None)[0]


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[MessageSent]]:
    """A run in which one client misses the rounds about the switch, and what was sent."""
    out, events = tmp_path_factory.mktemp("runs") / "run", list[Event]()
    lost = [ClientOutage("ben", 1), ClientOutage("ben", 2)]
    launch.run(made(data, lost=lost, dtype="float32"), engine=Serial(), out=out, listeners=[events.append])
    return out, [event for event in events if isinstance(event, MessageSent) and event.call == "work"]


def parts(messages: Sequence[MessageSent], round: int, direction: str, client: str = "ann") -> dict[str, int]:
    (found,) = (e for e in messages if (e.round, e.direction, e.client) == (round, direction, client))
    return dict(found.parts)


def test_sparse_values_travel_first_and_factors_then(finished: tuple[Path, list[MessageSent]]) -> None:
    _, messages = finished
    for round in (0, 1):
        assert parts(messages, round, "up")["delta"] == 4 * sum(COUNTS) == parts(messages, round, "down")["params"]
    for round in (2, 3):
        assert parts(messages, round, "up")["delta"] == 4 * sum(FACTORS) == parts(messages, round, "down")["params"]


def test_what_is_left_is_sent_once_as_values_and_factors(finished: tuple[Path, list[MessageSent]]) -> None:
    _, messages = finished
    sent = 4 * (sum(COUNTS) + sum(FACTORS))
    assert [parts(messages, round, "down").get("base_delta", 0) for round in range(4)] == [0, 0, sent, 0]
    assert parts(messages, 3, "down", "ben")["base_delta"] == sent, "who has missed it is sent it later"


def test_the_model_does_not_change_at_the_switch(data: Path, tmp_path: Path) -> None:
    """What the sparse values came to is what the factors and the frozen weights begin with."""
    launch.run(made(data, (SparseFirst(rounds=2), ByExamples())), engine=Serial(), out=tmp_path / "slora")
    launch.run(made(data, (SparseFirst(rounds=9), ByExamples())), engine=Serial(), out=tmp_path / "sparse")
    launch.run(made(data, (SparseFirst(2, "dropped"), ByExamples())), engine=Serial(), out=tmp_path / "dropped")
    model = load(made(data).task)
    after = {}
    for name in ("slora", "sparse", "dropped"):
        run = Checkpoints(tmp_path / name / "checkpoints", 9).load(2)
        assert run is not None
        after[name] = logits(model, run)
    base = model.adapter.logits({}, TOKENS, torch.ones_like(TOKENS), None)[0]
    assert off(after["slora"], after["sparse"]) < 1e-9
    assert off(after["dropped"], after["sparse"]) > 1e-4 and off(after["sparse"], base) > 1e-3


def test_a_run_resumes_to_the_bit(data: Path, tmp_path: Path) -> None:
    """From every round, with a client that misses the switch. Engines: tests/papers/test_presets_everywhere.py."""
    exp = made(data, lost=[ClientOutage("ben", 1), ClientOutage("ben", 2)])
    whole = launch.run(exp, engine=Serial(), out=tmp_path / "whole")
    resumed = in_pieces(exp, tmp_path / "cut")
    assert tree.equal(dict(resumed.params), dict(whole.params))
    assert tree.equal(resumed.base_delta.joined_trees(), whole.base_delta.joined_trees())


@pytest.mark.parametrize("rounds", [1, 4])  # before the switch, and behind it
def test_what_a_run_leaves_computes_as_its_clients_do(rounds: int, data: Path, tmp_path: Path) -> None:
    exp = replace(made(data), rounds=rounds)
    launch.run(exp, engine=Serial(), out=tmp_path / "run")
    run = open_run(tmp_path / "run")
    expected = logits(run.model, run.state)
    folded = run.model.adapter.logits(run.params, TOKENS, torch.ones_like(TOKENS), None)[0]
    assert off(folded, expected) < 1e-9
    merged = AutoModelForCausalLM.from_pretrained(export(tmp_path / "run", "merged")).double()
    assert off(merged(TOKENS).logits[:, -1], expected) < 1e-5  # it is stored in float32
    base = AutoModelForCausalLM.from_pretrained(materialise(run.model.base)).double()
    peft = PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter")).double()
    assert off(peft(TOKENS).logits[:, -1], expected) < 1e-5


def test_a_round_without_answers_switches_to_fresh_factors(data: Path, tmp_path: Path) -> None:
    """Zeros on both sides of a product would never move."""
    clients = ("ann", "ben", "cid", "dot", "eve")
    exp = made(data, (SparseFirst(rounds=1), ByExamples()), lost=[ClientOutage(client, 0) for client in clients])
    result = launch.run(exp, engine=Serial(), out=tmp_path / "run")
    assert all(bool(leaf.any()) for name, leaf in result.params.items() if low_rank.is_factor(name))


# What is refused.


@pytest.mark.parametrize(
    ("stages", "adapter", "message"),
    [
        (STAGES, Lora(), "sparse_first works on the adapter sparse_lora, but task.adapter is lora; use sparse_lora"),
        (
            (Momentum(), *STAGES),
            ADAPTER,
            "sparse_first adds .* but momentum before it takes a step of its own .*; put momentum behind sparse_first",
        ),
        ((Keep(("*lora_B",)), *STAGES), ADAPTER, "sparse_first works on both .*, but keep keeps"),
    ],
)
def test_what_cannot_be_is_refused(data: Path, stages, adapter, message: str) -> None:
    with pytest.raises(CheckError, match=message):
        check(made(data, stages, adapter=adapter))


def test_unequal_ranks_are_refused(data: Path) -> None:
    with pytest.raises(CheckError, match=r"client b has rank 2 and the adapter rank 4, but no stage brings"):
        check_profiles(made(data), {"a": Profile(), "b": Profile(rank=2)})


def test_a_server_optimiser_may_stand_behind(data: Path, tmp_path: Path) -> None:
    exp = made(data, (SparseFirst(rounds=2), Momentum(), Uniform()))
    assert launch.run(exp, engine=Serial(), out=tmp_path / "run").base_delta.version == 2


def test_rounds_below_zero_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"sparse_first\.rounds is -1; it must be 0 or more"):
        SparseFirst(rounds=-1)
