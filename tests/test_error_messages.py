"""What messages say is true: the keys that they name are accepted, and the name that they suggest is what was meant."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

import fedllm
from fedllm.aggregators.base import Aggregator
from fedllm.engines.registry import engine_of
from fedllm.errors import ELSEWHERE, ConfigError, nearest
from fedllm.experiment.catalog import NOUNS
from fedllm.experiment.checks.rules import NO_SECRECY
from fedllm.experiment.methods import METHODS
from fedllm.experiment.overrides import overridden
from fedllm.experiment.record import Experiment
from fedllm.messages.traits import Fact
from fedllm.models.task import Task

KEY = re.compile(
    r"(?<![\w./{-])(?:task|federation|work|evaluation|limits|demands)(?:\.[a-z]\w*)+(?![\w(/])"  # task.adapter.lora
)


def texts(path: Path) -> Iterator[str]:
    """Each piece of text in a file of Python: messages and docstrings."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_every_key_in_a_message_is_one_that_an_experiment_may_have() -> None:
    found = {
        key for path in Path(fedllm.__file__).parent.rglob("*.py") for text in texts(path) for key in KEY.findall(text)
    }
    assert {"work.sgd.lr", "work.sgd.clip_norm", "task.scope.share"} <= found, "the pattern misses what it should find"
    for key in sorted(found):
        overridden({}, f"{key}=null")


@pytest.mark.parametrize("key", ["work.lr", "work.sgd.learning_rate", "task.adapter.lora.r", "work.sgd.batchable"])
def test_a_key_that_is_none_is_refused(key: str) -> None:
    with pytest.raises(ConfigError):
        overridden({}, f"{key}=1")


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("work.sgd.learning_rate", "lr"),
        ("work.sgd.max_grad_norm", "clip_norm"),
        ("task.adapter.lora.lora_alpha", "alpha"),
        ("task.adapter.lora.target_modules", "targets"),
        ("num_rounds", "rounds"),
    ],
)
def test_a_name_from_elsewhere_is_understood(key: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=rf"unknown key '{key}'; did you mean '{meant}'\?"):
        overridden({}, f"{key}=1")


def test_a_key_that_is_like_no_other_lists_what_a_file_may_set_and_nothing_else() -> None:
    with pytest.raises(ConfigError) as caught:
        overridden({}, "work.sgd.xyz=1")
    listed = str(caught.value).partition("known: ")[2].split(", ")
    assert "lr" in listed and not {"batchable", "makes"} & set(listed)
    for key in listed:
        overridden({}, f"work.sgd.{key}=null")


def test_names_from_elsewhere_mean_names_of_ours() -> None:
    """Each is a setting of a record or a component, or a value."""
    records = [Experiment, Task, *(cls for table in NOUNS.values() for cls in table.values())]
    ours = {"cuda", *(item.name for record in records for item in fields(record))}
    assert all(set(meant) & ours for meant in ELSEWHERE.values())


@pytest.mark.parametrize(
    ("given", "tail"),
    [
        ("fedprx", "did you mean 'fedprox'"),
        ("fedivg", "did you mean 'fedavg'"),
        ("secure_fedavg", "known: "),
        ("fedmedian", "known: "),
    ],
)
def test_another_method_is_no_misspelt_one(given: str, tail: str) -> None:
    for name in (f"method={given}", f"method.{given}.mu=1"):
        with pytest.raises(ConfigError, match=f"unknown method '{given}'; {tail}"):
            fedllm.build(overridden({"task": {"model": "tiny-llama"}}, name))


def test_an_unknown_engine_lists_auto_as_well() -> None:
    with pytest.raises(ConfigError, match="unknown engine 'fast'; known: auto, batched, ray, serial"):
        engine_of("fast")
    assert engine_of("auto") is None


def test_what_demands_secrecy_is_told_what_hides_updates() -> None:
    """`rules.NO_SECRECY` names the aggregators that do."""
    hiding = {name for name, cls in NOUNS[Aggregator].items() if Fact.HIDDEN not in cls().traits.loses}
    assert hiding == {"secure_sum", "bucketed", "homomorphic_sum"} and all(name in NO_SECRECY for name in hiding)


def test_the_nearest_of_equal_spellings_is_the_one_that_means_the_same() -> None:
    assert nearest("gpu", ("auto", "cpu", "cuda")) == "; did you mean 'cuda'?"
    assert nearest("r", ("alpha", "rate")).startswith("; known"), "there is no rank here"
    assert METHODS.keys() >= {"fedavg"}
