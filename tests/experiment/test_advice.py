"""What can be run and is hardly meant: each sentence, and the nearest experiment that hears nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedllm.data.federation import Population
from fedllm.data.shards import Shards
from fedllm.evaluation.settings import Evaluation
from fedllm.experiment.checks import advice as module
from fedllm.experiment.checks.advice import advice
from fedllm.experiment.record import Experiment
from fedllm.messages.context import Profile
from fedllm.models.task import Task
from fedllm.stages.weighting.by_examples import ByExamples
from fedllm.training.sgd import Sgd

RECORD = {"prompt": "a", "response": "b"}
POPULATION = Population({"a": [RECORD], "b": [RECORD]}, {"a": [RECORD], "b": []})
PLAIN = Experiment(
    task=Task("tiny-llama", device="cpu"), federation=Shards("quickstart"), work=Sgd(steps=1), stages=(ByExamples(),)
)


def of(**profiles: Profile) -> Experiment:
    return replace(PLAIN, federation=Shards("quickstart", profiles=profiles))


def test_a_plain_experiment_hears_nothing() -> None:
    assert advice(PLAIN, POPULATION) == []


@pytest.mark.parametrize(
    ("experiment", "said"),
    [
        (replace(PLAIN, work=Sgd(steps=0)), "work.sgd.steps is 0: nothing is trained, and the model stays as it is"),
        (
            replace(PLAIN, work=Sgd(steps=1, lr=0.0)),
            "work.sgd.lr is 0: nothing is trained, and the model stays as it is",
        ),
        (
            of(a=Profile(steps=0), b=Profile(lr=0.0)),
            "work.sgd.lr is 0: nothing is trained, and the model stays as it is",
        ),
    ],
)
def test_an_experiment_that_trains_nothing_is_told(experiment: Experiment, said: str) -> None:
    assert advice(experiment, POPULATION) == [said]


def test_one_client_that_trains_is_enough() -> None:
    assert advice(of(a=Profile(steps=0)), POPULATION) == []
    assert advice(replace(of(b=Profile(steps=3)), work=Sgd(steps=0)), POPULATION) == []


@pytest.mark.parametrize(
    ("dtype", "emulated", "told"),
    [
        ("bfloat16", True, True),
        ("bfloat16", False, False),
        ("auto", True, False),
        ("float32", True, False),
    ],
)
def test_a_type_that_the_device_emulates_is_told(
    dtype: str, emulated: bool, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "emulates_bfloat16", lambda device: emulated)
    found = advice(replace(PLAIN, task=Task("tiny-llama", device="cpu", dtype=dtype)), POPULATION)  # type: ignore[arg-type]
    assert len(found) == told
    assert not told or "it is emulated, and much slower than float32; set task.dtype to auto or float32" in found[0]


def test_figures_without_held_out_records_are_told() -> None:
    nobody = Population({"a": [RECORD]}, {"a": []})
    (said,) = advice(replace(PLAIN, evaluation=Evaluation(compare=("local_only",))), nobody)
    assert said == (
        "no record is held out: nothing is evaluated, and local_only cannot be compared; set federation.shards.heldout"
    )
    assert advice(replace(PLAIN, evaluation=Evaluation(metrics=())), nobody) == []
