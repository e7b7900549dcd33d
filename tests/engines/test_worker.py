"""Clients of another process: an experiment as text, answers as bytes, and what goes wrong as a sentence."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from fedllm.engines.client import Site
from fedllm.engines.client_store import ClientStore
from fedllm.engines.remote.worker import RemoteWorker, to_text
from fedllm.errors import ConfigError
from fedllm.experiment.record import Experiment
from fedllm.messages import serialization
from fedllm.messages.context import RoundContext
from fedllm.messages.update import Request
from fedllm.runs import server_round
from fedllm.stages.base import Stage
from fedllm.tensors import tree
from tests.runs.small import stateful, write_records


@dataclass(frozen=True)
class Own(Stage):
    """A stage that no catalog has."""


@pytest.fixture
def experiment(tmp_path: Path, cache_folder: Path) -> Iterator[Experiment]:
    before = os.getcwd()
    yield stateful(write_records(tmp_path / "people.jsonl"))
    os.chdir(before)


def asked(experiment: Experiment, site: Site) -> Request:
    everyone = RoundContext(0, experiment.key, 3, 3, 3)
    run = server_round.initial_state(experiment, site.model.initial_params(experiment.key))
    return server_round.requests_for(experiment, run, ["ann", "ben", "cid"], everyone)["ben"]


def test_a_host_answers_as_a_site_of_this_process(experiment: Experiment, tmp_path: Path) -> None:
    worker = RemoteWorker()
    (tmp_path / "memories").mkdir()
    count = worker.initialize(to_text(experiment), str(tmp_path), str(tmp_path / "memories"))
    site = Site.of(experiment, None)
    assert count == site.model.base.model.num_parameters()
    request = asked(experiment, site)
    ((data, parts),) = worker.answers("work", [serialization.serialize(request)])
    answer = site.answer("work", request)
    assert data == serialization.serialize(answer)
    assert parts == serialization.part_bytes(answer)
    assert type(data) is bytes and json.loads(json.dumps(parts)) == parts  # nothing that only Python could read
    here, there = (
        store.load("ben", 1, len(experiment.pipeline)) for store in (site.store, ClientStore(tmp_path / "memories"))
    )
    assert any(here) and all(map(tree.equal, here, there))


def test_a_host_keeps_the_model_of_the_same_task_alone(experiment: Experiment, tmp_path: Path) -> None:
    worker = RemoteWorker()
    (tmp_path / "memories").mkdir()
    models = []
    wider = replace(experiment, task=replace(experiment.task, dtype="float64"))
    for other in (experiment, replace(experiment, seed=1), wider):
        worker.initialize(to_text(other), str(tmp_path), str(tmp_path / "memories"))
        assert worker.site is not None and worker.site.experiment == other
        models.append(worker.site.model.base)
    assert models[0] is models[1] is not models[2]


def test_what_another_process_cannot_see_is_named(experiment: Experiment, tmp_path: Path) -> None:
    worker, nowhere = RemoteWorker(), str(tmp_path / "nowhere")
    for place, folder in ((nowhere, str(tmp_path)), (str(tmp_path), nowhere)):
        told = worker.initialize(to_text(experiment), place, folder)
        assert isinstance(told, str) and nowhere in told and "under one path" in told
        assert worker.answers("work", []) == told
    data = json.loads(to_text(experiment))
    data["federation"]["shards"]["data"] = nowhere
    told = worker.initialize(json.dumps(data), str(tmp_path), str(tmp_path))
    assert isinstance(told, str) and nowhere in told


def test_python_of_ones_own_is_refused(experiment: Experiment) -> None:
    with pytest.raises(ConfigError, match=r"test_worker:Own is Python of your own.*use the engine serial or batched"):
        to_text(replace(experiment, stages=(Own(), *experiment.stages)))


def test_memory_that_runs_out_is_a_sentence(experiment: Experiment, tmp_path: Path) -> None:
    worker = RemoteWorker()
    (tmp_path / "memories").mkdir()
    worker.initialize(to_text(experiment), str(tmp_path), str(tmp_path / "memories"))
    assert worker.site is not None
    request = serialization.serialize(asked(experiment, worker.site))

    def full(jobs: object, model: object) -> object:
        raise torch.OutOfMemoryError("CUDA out of memory")

    worker.site.train = full  # type: ignore[assignment]
    told = worker.answers("work", [request])
    assert isinstance(told, str) and "CUDA out of memory" in told and "lower the engine's stack" in told
