"""Every preset on a small federation: the serial, the batched and the Ray engine, and a resume from every round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedllm import launch, tree
from fedllm.catalog import METHODS
from fedllm.config import build
from fedllm.engine import Engine
from fedllm.engines.batched import Batched
from fedllm.engines.ray import Team
from fedllm.engines.serial import Serial
from fedllm.events import CheckpointSaved, Event
from fedllm.experiment import Experiment
from fedllm.tree import Tree
from tests.doubles.kept import Kept
from tests.engines.cohort import write_records

ROUNDS = 3
LORA = {"rank": 2, "alpha": 4, "targets": ["q_proj", "down_proj"]}
ADAPTERS: dict[str, Any] = {"full": "full", "fed_sb": {"lora_xs": LORA}, "slora": {"sparse_lora": LORA}}
SETTINGS: dict[str, Any] = {"slora": {"slora": {"rounds": 2}}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("data") / "people.jsonl")


def made(method: str, data: Path) -> Experiment:
    spec = {
        "task": {"model": "tiny-llama", "dtype": "float64", "adapter": ADAPTERS.get(method, {"lora": LORA})},
        "federation": {"shards": {"data": str(data), "heldout": 0.0, "split": {"by": "who"}}},
        "work": {"sgd": {"lr": 0.05, "steps": 2, "batch_size": 2, "max_length": 48}},
        "evaluation": {"metrics": []},
        "limits": {"keep_last": 9},
        "rounds": ROUNDS,
    }
    return build({**spec, "method": SETTINGS.get(method, method)})


def came_to(result: launch.Result) -> Tree:
    """The shared leaves, and what was added to the frozen weights."""
    return {**result.params, **result.shift.joined_trees()}


@pytest.mark.parametrize("method", METHODS)
def test_engines_agree(method: str, data: Path, tmp_path: Path, team: Team) -> None:
    """To the bit where each client is alone, within 1e-9 of what was moved where they share a pass."""
    exp = made(method, data)

    def ended(engine: Engine, name: str) -> Tree:
        return came_to(launch.run(exp, engine=engine, out=tmp_path / name))

    serial, ray = ended(Serial(), "serial"), ended(Kept(team), "ray")
    assert tree.equal(ray, serial)
    if METHODS[method].adapter == "full":
        return  # not batchable
    batched = ended(Batched(stack=3), "batched")
    assert batched.keys() == serial.keys()
    apart = torch.stack([(batched[name] - leaf).norm() for name, leaf in serial.items()]).norm()
    assert float(apart) < 1e-9 * tree.norm(serial)


@pytest.mark.parametrize("stop_after", range(ROUNDS))
@pytest.mark.parametrize("method", METHODS)
def test_a_run_resumes_to_the_bit_from_every_round(method: str, stop_after: int, data: Path, tmp_path: Path) -> None:
    exp = made(method, data)

    def stop(event: Event) -> None:
        if isinstance(event, CheckpointSaved) and event.round == stop_after:
            raise KeyboardInterrupt

    whole = came_to(launch.run(exp, engine=Serial(), out=tmp_path / "whole"))
    with pytest.raises(launch.Interrupted):
        launch.run(exp, engine=Serial(), out=tmp_path / "cut", listeners=[stop])
    assert tree.equal(came_to(launch.run(exp, engine=Serial(), out=tmp_path / "cut", resume=True)), whole)
