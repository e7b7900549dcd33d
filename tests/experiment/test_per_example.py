"""A work that clips each example is refused where an example's gradient is not its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest

from fedllm.errors import CheckError
from fedllm.experiment.checks.check import check
from fedllm.experiment.config_file import build
from fedllm.experiment.record import Experiment
from fedllm.models.adapters.peft import Peft
from fedllm.models.objectives.sft import Sft


@dataclass(frozen=True)
class Contrastive(Sft):
    """Each example is told from the others of its batch."""

    couples_examples: ClassVar[bool] = True


def made(work: str = "dp_sgd", **settings: Any) -> Experiment:
    return build(
        {
            "task": {"model": "tiny-llama", "adapter": settings.pop("adapter", "lora")},
            "federation": {"shards": {"data": "handbook"}},
            "work": {work: {"steps": 1, **({"noise_multiplier": 1.0} if work == "dp_sgd" else {})}},
            "stages": settings.pop("stages", ["uniform"]),
        }
    )


@pytest.mark.parametrize("adapter", ["lora", "lora_xs", "bottleneck", "prefix", "soft_prompt"])
def test_adapters_that_can_be_stacked_go(adapter: str) -> None:
    check(made(adapter=adapter))


@pytest.mark.parametrize(("adapter", "name"), [("full", "full"), ("norms", "norms"), ("bitfit", "bit_fit")])
def test_adapters_without_gradients_of_an_example_are_refused(adapter: str, name: str) -> None:
    check(made("sgd", adapter=adapter))
    with pytest.raises(
        CheckError,
        match=f"work dp_sgd clips the gradient of each example by itself, but task.adapter {name} has one gradient "
        "for a whole batch .*; use an adapter that can be stacked, such as lora",
    ):
        check(made(adapter=adapter))
    with pytest.raises(CheckError, match=r"task.adapter peft has one gradient"):
        check(replace(made(), task=replace(made().task, adapter=Peft("adapter_config.json"))))


def test_an_objective_that_couples_examples_is_refused() -> None:
    coupled = replace(made().task, objective=Contrastive())
    check(replace(made("sgd"), task=coupled))
    with pytest.raises(
        CheckError,
        match=r"task.objective contrastive makes the loss of one depend on the others of its batch; use .* such as sft",
    ):
        check(replace(made(), task=coupled))
    assert not Sft.couples_examples


def test_weights_by_examples_are_refused() -> None:
    check(made("sgd", stages=["by_examples"]))
    with pytest.raises(CheckError, match="work dp_sgd is right only if every client weighs the same, but by_examples"):
        check(made(stages=["by_examples"]))


@pytest.mark.parametrize("stage", ["scaffold", "prox", "top_k", "momentum"])
def test_stages_that_work_on_what_is_noised_go(stage: str) -> None:
    settings = {"prox": {"mu": 0.1}, "top_k": {"fraction": 0.5}}.get(stage)
    check(made(stages=[{stage: settings} if settings else stage, "uniform"]))
