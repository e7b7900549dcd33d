"""Diagnostics and alarms of whole runs on a small model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedllm
from fedllm.aggregators.secure_sum import SecureSum
from fedllm.engines.base import Engine
from fedllm.engines.serial import Serial
from fedllm.events import Diagnosed, Emit, Event, RoundStarted, Warned
from fedllm.experiment.config_file import build
from fedllm.experiment.record import Experiment
from fedllm.messages.call import Call, Replies
from fedllm.messages.context import Profile
from fedllm.messages.update import Request, Update
from fedllm.report.run_history import effective
from fedllm.stages.privacy.fixed_point import FixedPoint
from tests.runs.small import Stop, StopAt, adapter_hash, events, small, spec


def by_method(data: Path, method: str, **changes: Any) -> Experiment:
    made = spec(data, **changes)
    del made["stages"]
    return build({**made, "method": method})


def diagnosed(folder: Path) -> list[Diagnosed]:
    return [event for event in effective(events(folder)) if isinstance(event, Diagnosed)]


def alarms(folder: Path) -> list[tuple[int, str]]:
    """Round and first words."""
    told = [event for event in events(folder) if isinstance(event, Warned) and event.round is not None]
    return [(event.round, re.split("[:,]", event.text.partition(": ")[2])[0]) for event in told]  # type: ignore[misc]


@pytest.mark.parametrize("method", ["ffa_lora", "rolora"])
def test_methods_without_a_bias_have_none_in_any_round(data: Path, tmp_path: Path, method: str) -> None:
    found = diagnosed(fedllm.run(by_method(data, method), out=tmp_path / "run").folder)
    assert [event.round for event in found] == [0, 1, 2]
    assert all(event.bias <= 1e-6 and event.bias_of_means <= 1e-6 for event in found)  # type: ignore[operator]
    assert all(event.product_norm > 0.01 for event in found)  # type: ignore[operator]


def test_fedit_of_clients_that_differ_has_one(data: Path, tmp_path: Path) -> None:
    found = diagnosed(fedllm.run(by_method(data, "fedit"), out=tmp_path / "run").folder)
    assert len(found) == 3
    assert all(event.bias > 0.01 and event.bias == pytest.approx(event.bias_of_means, rel=1e-4) for event in found)  # type: ignore[operator]


def test_of_factors_that_stay_with_clients_no_product_is_known(data: Path, tmp_path: Path) -> None:
    found = diagnosed(fedllm.run(by_method(data, "fedsa_lora", rounds=1), out=tmp_path / "run").folder)[0]
    assert (found.bias, found.product_norm, found.effective_rank) == (None, None, None)
    assert found.cosine is not None and found.drift > 0


def test_the_rank_collapses_in_flexlora_and_not_in_raflora(data: Path, tmp_path: Path) -> None:
    """What raFLoRA (arXiv 2602.13486) says of a mean that damps components which few clients have."""
    energies = {}
    for method in ("flexlora", "raflora"):
        made = by_method(data, method, rounds=6, task__adapter__lora__rank=8, evaluation__every=None)
        profiles = {"ann": Profile(rank=2), "ben": Profile(rank=4)}
        made = replace(made, federation=replace(made.federation, profiles=profiles))
        found = diagnosed(fedllm.run(made, out=tmp_path / method).folder)
        assert {event.smallest_rank for event in found} == {2}
        energies[method] = [event.energy_above for event in found]
    assert energies["flexlora"][0] > 0.1 and energies["flexlora"][-1] < 0.01
    assert min(energies["raflora"]) > 0.2


def test_drift_grows_with_local_steps(data: Path, tmp_path: Path) -> None:
    drifts = [
        diagnosed(fedllm.run(small(data, work__sgd__steps=steps, rounds=1), out=tmp_path / str(steps)).folder)[0].drift
        for steps in (1, 2, 4, 8)
    ]
    assert drifts == sorted(drifts) and drifts[-1] > 2 * drifts[0]


@dataclass(frozen=True, eq=False)
class Overheard(Engine):
    """The serial engine; keeps each update's delta as one vector, by round and client."""

    kept: dict[tuple[int, str], np.ndarray[Any, Any]] = field(default_factory=dict)

    @contextmanager
    def open(self, experiment: Experiment, folder: Path | None, emit: Emit) -> Iterator[Call]:
        with Serial().open(experiment, folder, emit) as call:

            def heard(name: str, requests: Mapping[str, Request]) -> Replies:
                for client, reply in call(name, requests):
                    if name == "work" and isinstance(reply, Update):
                        part = reply.parts["delta"]
                        flat = np.concatenate([leaf.double().numpy().ravel() for _, leaf in sorted(part.tree.items())])
                        self.kept[requests[client].ctx.round, client] = flat / part.weight
                    yield client, reply

            yield heard


def test_drift_and_cosines_are_those_of_the_updates(data: Path, tmp_path: Path) -> None:
    engine = Overheard()
    for event in diagnosed(fedllm.run(small(data), engine=engine, out=tmp_path / "run").folder):
        rows = np.stack([engine.kept[event.round, client] for client in event.clients])
        norms = np.linalg.norm(rows, axis=1)
        assert list(event.clients.values()) == pytest.approx(norms, rel=1e-5)
        wanted = (rows @ rows.T / np.outer(norms, norms))[np.triu_indices(len(rows), 1)]
        assert event.cosines == pytest.approx(list(wanted), abs=1e-4)
        assert event.cosine == pytest.approx(wanted.mean(), rel=1e-5)
        share = np.array([6, 3, 2]) / 11
        assert event.dissimilarity == pytest.approx(
            math.sqrt((share * norms**2).sum()) / np.linalg.norm(share @ rows), rel=1e-5
        )


def test_a_run_is_the_same_without(data: Path, tmp_path: Path) -> None:
    with_, without = (
        fedllm.run(small(data, **changes), out=tmp_path / str(place)).folder
        for place, changes in enumerate(({}, {"evaluation__diagnostics": None}))
    )
    assert adapter_hash(with_) == adapter_hash(without)
    assert len(diagnosed(with_)) == 3 and diagnosed(without) == []


def test_nothing_is_watched_where_the_server_may_learn_sums_alone(data: Path, tmp_path: Path) -> None:
    plain = small(data, stages=["uniform"], evaluation__diagnostics={"rounds": 1, "bytes_per_loss": 1.0})
    secret = replace(plain, stages=(*plain.stages, FixedPoint()), aggregator=SecureSum(corrupt=0.0))
    found = fedllm.run(secret, engine=Serial(), out=tmp_path / "run").folder
    assert diagnosed(found) == []
    assert alarms(found)[0] == (1, "the bytes outweigh the gain"), "losses and bytes are sums"


@pytest.mark.parametrize("count", [1, 2])
def test_resumed_runs_have_one_of_each(data: Path, tmp_path: Path, count: int) -> None:
    experiment = small(data, evaluation__diagnostics={"rounds": 1, "agreement": 2.8})
    whole = fedllm.run(experiment, out=tmp_path / "whole").folder
    with pytest.raises(Stop):
        fedllm.run(
            experiment, out=tmp_path / "run", listeners=[StopAt(lambda event: isinstance(event, RoundStarted), count)]
        )
    again = fedllm.run(experiment, out=tmp_path / "run", resume=True).folder
    assert [event for event in events(again) if isinstance(event, Diagnosed)] == diagnosed(whole)
    assert alarms(again) == alarms(whole) == [(0, "clients diverge")]


def test_alarms_of_lost_rounds_are_not_told_twice(data: Path, tmp_path: Path) -> None:
    """Rounds 0 and 1 run again, for no checkpoint of them was due; what was said of them no longer counts."""
    experiment = small(
        data,
        limits={"checkpoint_every": 3},
        evaluation__diagnostics={"rounds": 2, "agreement": 2.8},
        evaluation__every=None,
    )
    with pytest.raises(Stop):
        fedllm.run(
            experiment, out=tmp_path / "run", listeners=[StopAt(lambda event: isinstance(event, RoundStarted), 2)]
        )
    again = fedllm.run(experiment, out=tmp_path / "run", resume=True).folder
    assert [event.round for event in diagnosed(again)] == [0, 1, 2]
    told = [event for event in effective(events(again)) if isinstance(event, Warned) and event.round is not None]
    assert [event.round for event in told] == [1]


CALM: Mapping[str, Any] = {"rounds": 1, "agreement": 0.0, "bias": 1e6, "bytes_per_loss": 1e300}


@pytest.mark.parametrize(
    ("limits", "changes", "expected"),
    [
        ({}, {}, []),
        ({"agreement": 2.8}, {}, [(0, "clients diverge")]),
        ({"bias": 0.01}, {}, [(0, "the aggregation loses 3% of the mean of the clients' products")]),
        ({"bytes_per_loss": 1e3}, {}, [(1, "the bytes outweigh the gain")]),
        ({}, {"work__sgd__lr": 0.0, "work__sgd__batch_size": 6}, [(1, "the training loss does not fall")]),
    ],
    ids=["none", "cosine", "bias", "bytes", "loss"],
)  # fmt: skip
def test_each_alarm_in_a_run(
    data: Path, tmp_path: Path, limits: Mapping[str, Any], changes: Mapping[str, Any], expected: list[tuple[int, str]]
) -> None:
    experiment = small(data, evaluation__diagnostics={**CALM, **limits}, **changes)
    heard: list[Event] = []
    folder = fedllm.run(experiment, out=tmp_path / "run", listeners=[heard.append]).folder
    assert alarms(folder) == expected
    assert [event for event in heard if isinstance(event, Warned) and event.round is not None] == [
        event for event in events(folder) if isinstance(event, Warned) and event.round is not None
    ]
