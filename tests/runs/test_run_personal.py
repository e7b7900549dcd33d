"""Leaves that stay with their client: they are never sent, differ between clients, and are used where they belong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fedllm
from fedllm.errors import RunError
from fedllm.evaluation.scores import Scorer
from fedllm.events import Evaluated
from fedllm.messages import serialization
from fedllm.rng import Key
from fedllm.runs.loaded_run import open_run
from fedllm.tensors.tree import equal
from tests.runs.small import SIZES, events, small

SHARED, KEPT = "lora_A", "lora_B"


@pytest.fixture(scope="module")
def payloads() -> list[bytes]:
    return []


@pytest.fixture(scope="module")
def personal(data: Path, payloads: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> fedllm.Result:
    """A run that shares lora_A alone, with every message that crossed."""
    pack = serialization.serialize

    def packed(message: serialization.Message) -> bytes:
        payloads.append(pack(message))
        return payloads[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serialization, "serialize", packed)
        patch.setenv("FEDLLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        experiment = small(data, task__scope={"share": [f"*{SHARED}"]}, evaluation__limit=None)
        return fedllm.run(experiment, out=tmp_path_factory.mktemp("personal") / "run")


def leaves(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_each_client_has_an_adapter_of_its_own(personal: fedllm.Result) -> None:
    assert {path.name for path in (personal.folder / "clients").iterdir()} == set(SIZES)
    own = {client: leaves(personal.folder / "clients" / client) for client in SIZES}
    everyone = leaves(personal.folder)
    for name in everyone:
        values = [own[client][name] for client in SIZES]
        if SHARED in name:
            assert all(torch.equal(value, everyone[name]) for value in values)
        else:
            assert KEPT in name
            assert not everyone[name].any(), "the server never saw it: it is as it began"
            assert all(value.any() for value in values)
            assert not torch.equal(values[0], values[1]) and not torch.equal(values[1], values[2])


def test_kept_leaves_never_cross(personal: fedllm.Result, payloads: list[bytes]) -> None:
    memories = [load_file(path) for path in (personal.folder / "checkpoints" / "clients").rglob("*.safetensors")]
    kept = {leaf.numpy().tobytes() for memory in memories for leaf in memory.values() if leaf.any()}
    assert len(kept) >= 3 * 4, "three clients keep four leaves each"
    assert len(payloads) == 2 * 2 * 3 * 3
    for payload in payloads:
        assert KEPT.encode() not in payload
        assert not any(values in payload for values in kept)
        header = json.loads(payload[8 : 8 + int.from_bytes(payload[:8], "little")])
        assert not any(KEPT in name for name in header)
    assert all(SHARED in name for name in personal.params)


def test_the_evaluation_uses_them(data: Path, personal: fedllm.Result) -> None:
    opened = open_run(personal.folder)
    population = opened.experiment.federation.load(opened.experiment.key)
    scorer = Scorer.of(opened.experiment.evaluation, opened.experiment.work.max_length, population)
    last = [event for event in events(personal.folder) if isinstance(event, Evaluated)][-1]
    for client in SIZES:
        params = opened.params_of(client)
        assert not equal(params, opened.params)
        sums = scorer.sums(opened.model, params, population.heldout[client])
        without = scorer.sums(opened.model, opened.params, population.heldout[client])
        assert last.clients[client] == scorer.figures(sums) != scorer.figures(without)


def test_a_client_s_model_is_opened_by_name(personal: fedllm.Result, finished: fedllm.Result) -> None:
    ben = open_run(personal.folder, client="ben")
    for name, leaf in leaves(personal.folder / "clients" / "ben").items():
        assert torch.equal(ben.params[name.removeprefix("base_model.model.").removesuffix(".weight")], leaf)
    with pytest.raises(RunError, match="no personal model of 'bem'; did you mean 'ben'"):
        open_run(personal.folder, client="bem")
    with pytest.raises(RunError, match="no client of this run has parameters of its own"):
        open_run(finished.folder, client="ben")


def test_frozen_leaves_keep_their_first_values_in_the_adapter(data: Path, tmp_path: Path) -> None:
    scope = {"freeze": [f"*{SHARED}"]}
    result = fedllm.run(small(data, rounds=1, task__scope=scope), out=tmp_path / "run")
    assert all(KEPT in name for name in result.params)
    opened = open_run(tmp_path / "run")
    fresh = opened.model.adapter.initial_params(opened.experiment.key.fold("adapter"))
    for name, leaf in leaves(tmp_path / "run").items():
        plain = name.removeprefix("base_model.model.").removesuffix(".weight")
        assert torch.equal(leaf, fresh[plain]) == (SHARED in name)
    assert isinstance(opened.experiment.key, Key)
