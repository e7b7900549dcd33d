"""For every method by name: what a client has of its own never crosses, and the shared part does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import fedllm
from fedllm.engines.serial import Serial
from fedllm.experiment.methods import METHODS
from fedllm.experiment.record import Experiment
from fedllm.messages import serialization
from fedllm.messages.update import Request, Update
from fedllm.models.loaded_model import load
from fedllm.runs.artifacts import newcomer, personal_leaves
from fedllm.runs.checkpoints import Checkpoints
from fedllm.runs.folder import Folder
from fedllm.runs.server_round import initial_state
from fedllm.stages.round_trip import has_personal
from fedllm.tensors.tree import Tree, matches
from tests.runs.small import spec, write_records

# A method that keeps something on its clients is named here; any other has no personal part.
PERSONAL = {"fedsa_lora", "ditto", "feddpa_t", "feddpa_f", "fdlora", "fedalt"}
# What never crosses, where a method sends what it keeps, too: FedALT always, FDLoRA in its first round.
ALONE = {"fedalt": ("*.router",), "fdlora": ("mixer.*",)}
LORA = {"rank": 2, "alpha": 4, "targets": ["q_proj", "v_proj"]}
ADAPTERS: Mapping[str, Any] = {"full": "full"}
PRIVATE = {"demands": {"privacy": {"target_epsilon": 8.0, "seeded_noise": True}}}


def experiment_of(method: str, data: Path) -> Experiment:
    made = spec(data, rounds=3 if method == "fdlora" else 2, evaluation__metrics=[], evaluation__every=None)
    del made["stages"]
    kind = METHODS[method].adapter or "lora"
    made["task"]["adapter"] = ADAPTERS.get(kind, {kind: LORA})
    made["method"] = method
    if METHODS[method].work == "zeroth_order":
        made["work"] = {"zeroth_order": {"steps": 1, "pool": 4}}
    if method.startswith("dp_") or method == "fedpower":
        made |= PRIVATE
        sampling = {"rotation": 3} if method == "dp_ftrl" else {"poisson": 0.9}
        made["federation"]["shards"]["sampling"] = sampling
    return fedllm.build(made)


@pytest.fixture
def crossed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, bytes]]]:
    """Every message that crosses, and its bytes."""
    seen: list[tuple[Any, bytes]] = []
    pack = serialization.serialize

    def packed(message: serialization.Message) -> bytes:
        seen.append((message, pack(message)))
        return seen[-1][1]

    monkeypatch.setattr(serialization, "serialize", packed)
    yield seen


def names_in(message: Any) -> set[str]:
    """The tensors' names in all parts of a message."""
    if isinstance(message, Request):
        return {name for tree in (message.params, *message.extras) for name in tree}
    return {name for part in message.parts.values() for name in part.tree} if isinstance(message, Update) else set()


def own_names(experiment: Experiment) -> tuple[set[str], Tree]:
    """Of a newcomer; and the initial value of every tensor that trains."""
    initial = load(experiment.task).initial_params(experiment.key)
    return set(newcomer(experiment, initial_state(experiment, initial), initial, "new")), initial


@pytest.mark.parametrize("method", METHODS)
def test_each_method_says_whether_it_keeps_something(method: str, tmp_path: Path) -> None:
    experiment = experiment_of(method, write_records(tmp_path / "people.jsonl"))
    assert has_personal(experiment.pipeline) == (method in PERSONAL)


@pytest.mark.parametrize("method", sorted(PERSONAL))
def test_what_a_client_has_of_its_own_never_crosses(
    method: str, crossed: list[tuple[Any, bytes]], tmp_path: Path
) -> None:
    experiment = experiment_of(method, write_records(tmp_path / "people.jsonl"))
    own, initial = own_names(experiment)
    own = {name for name in own if matches(name, ALONE.get(method, ("*",)))}
    fedllm.run(experiment, engine=Serial(), out=tmp_path / "run")
    up = [message for message, _ in crossed if isinstance(message, Update)]
    assert own and not own & set().union(*(names_in(message) for message, _ in crossed))
    moving = {
        name for name in initial if any(experiment.trains_in_round(name, turn) for turn in range(experiment.rounds))
    }
    sent = set().union(*(message.parts["delta"].tree for message in up))
    if method not in ALONE:
        assert up and sent == moving - own, "the shared part, and nothing else"
    state = Checkpoints(tmp_path / "run" / "checkpoints", 9).load(experiment.rounds)
    assert state is not None
    kept = personal_leaves(experiment, Folder(tmp_path / "run"), state, {**initial, **state.params})
    values = {
        leaf.numpy().tobytes()
        for leaves in kept.values()
        for name, leaf in leaves.items()
        if leaf.any() and name in own
    }
    assert len(values) >= (1 if method in ALONE else 3) and not any(
        value in data for value in values for _, data in crossed
    )


def test_a_leak_would_be_seen(crossed: list[tuple[Any, bytes]], tmp_path: Path) -> None:
    """The same look at a run that shares what FedSA-LoRA keeps."""
    data = write_records(tmp_path / "people.jsonl")
    own, _ = own_names(experiment_of("fedsa_lora", data))
    fedllm.run(experiment_of("fedit", data), engine=Serial(), out=tmp_path / "run")
    assert own <= set().union(*(names_in(message) for message, _ in crossed))
