"""Every preset on a small federation: the serial, the batched and the Ray engine, and a resume from every round."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from fedllm.engines.batched.engine import Batched
from fedllm.engines.remote.ray import RayActors
from fedllm.engines.serial import Serial
from fedllm.experiment.config_file import build
from fedllm.experiment.methods import METHODS
from fedllm.experiment.record import Experiment
from fedllm.runs import launch
from fedllm.tensors import tree
from fedllm.tensors.tree import Tree
from tests.doubles.kept import Kept
from tests.engines.cohort import in_pieces, write_records

ROUNDS = 3
LORA = {"rank": 2, "alpha": 4, "targets": ["q_proj", "down_proj"]}
XS = {"lora_xs": LORA}
ADAPTERS: dict[str, Any] = {"full": "full", "fed_sb": XS, "dp_fed_sb": XS, "slora": {"sparse_lora": LORA}}
ADAPTERS |= {name: {"multi_lora": LORA} for name, method in METHODS.items() if method.adapter == "multi_lora"}
SETTINGS: dict[str, Any] = {"slora": {"slora": {"rounds": 2}}}
PRIVATE = [name for name in METHODS if name.startswith("dp_") or name == "fedpower"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("data") / "people.jsonl")


def made(method: str, data: Path, *, noise: bool = True) -> Experiment:
    """Without noise a private method adds up what it clips: noise follows from the last bit of a sum."""
    private = method in PRIVATE
    dtype = "float32" if private and noise else "float64"
    spec = {
        "task": {"model": "tiny-llama", "dtype": dtype, "adapter": ADAPTERS.get(method, {"lora": LORA})},
        "federation": {"shards": {"data": str(data), "heldout": 0.0, "partition": {"by": "who"}}},
        "work": {"sgd": {"lr": 0.05, "steps": 2, "batch_size": 2, "max_length": 48}},
        "evaluation": {"metrics": []},
        "limits": {"keep_last": 9},
        "rounds": ROUNDS,
    }
    if METHODS[method].work == "zeroth_order":
        pool = {"pool": 8} if method != "fedmezo" else {}
        spec["work"] = {"zeroth_order": {"lr": 0.01, "steps": 2, "batch_size": 2, "max_length": 48, **pool}}
    if private and noise:
        spec["demands"] = {"privacy": {"target_epsilon": 8.0, "seeded_noise": True}}
    setting = {method: {"noise_multiplier": 0.0, "clip": 0.05}} if private and not noise else method
    return build({**spec, "method": SETTINGS.get(method, setting)})


def came_to(result: launch.Result) -> Tree:
    """The shared leaves, and what was added to the frozen weights."""
    return {**result.params, **result.base_delta.joined_trees()}


@pytest.fixture(scope="module")
def serial(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tree]:
    """What each method comes to on the serial engine, not stopped."""
    folder = tmp_path_factory.mktemp("serial")

    @cache
    def ended(method: str) -> Tree:
        return came_to(launch.run(made(method, data), engine=Serial(), out=folder / method))

    return ended


@pytest.mark.parametrize("method", METHODS)
def test_ray_agrees_to_the_bit(
    method: str, data: Path, tmp_path: Path, ray_actors: RayActors, serial: Callable[[str], Tree]
) -> None:
    found = launch.run(made(method, data), engine=Kept(ray_actors), out=tmp_path / "ray")
    assert tree.equal(came_to(found), serial(method))


@pytest.mark.parametrize("method", [method for method, preset in METHODS.items() if preset.adapter != "full"])
def test_stacks_agree(method: str, data: Path, tmp_path: Path, serial: Callable[[str], Tree]) -> None:
    """Within 1e-9 of what was moved. `full` is not batchable."""
    exp = made(method, data, noise=False)
    found = came_to(launch.run(exp, engine=Batched(stack=3), out=tmp_path / "batched"))
    private = method in PRIVATE
    expected = came_to(launch.run(exp, engine=Serial(), out=tmp_path / "serial")) if private else serial(method)
    assert found.keys() == expected.keys()
    apart = torch.stack([(found[name] - leaf).norm() for name, leaf in expected.items()]).norm()
    assert float(apart) < 1e-9 * tree.norm(expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_resumes_to_the_bit_from_every_round(
    method: str, data: Path, tmp_path: Path, serial: Callable[[str], Tree]
) -> None:
    assert tree.equal(came_to(in_pieces(made(method, data), tmp_path / "run")), serial(method))
