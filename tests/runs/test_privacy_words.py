"""What a run says of its own privacy: the promise before the first round, and what each round spent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fedllm
from fedllm.events import PrivacyPromised, PrivacySpent
from fedllm.runs.checkpoints import Checkpoints
from tests.runs.small import events, small, write_records

UNIFORM = {"uniform": {"denominator": "expected"}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("data") / "people.jsonl")


def run(data: Path, folder: Path, stage: dict[str, Any], **changes: Any) -> fedllm.Result:
    settings = {"demands": {"privacy": {"target_epsilon": 8.0, "seeded_noise": True}}, "evaluation": {}, **changes}
    return fedllm.run(small(data, stages=[UNIFORM, stage], **settings), engine="serial", out=folder)


def test_the_promise_is_what_the_rounds_come_to_and_the_clip_is_that_of_the_round(data: Path, tmp_path: Path) -> None:
    adaptive = {"clip": 0.1, "adaptive": {"count_noise": 1.0, "lr": 0.5, "quantile": 0.8}}
    result = run(data, tmp_path / "run", {"gaussian_dp": adaptive}, federation__shards__sampling={"poisson": 0.5})
    (promise,) = (event for event in events(tmp_path / "run") if isinstance(event, PrivacyPromised))
    spent = [event for event in events(tmp_path / "run") if isinstance(event, PrivacySpent)]
    assert promise.epsilon == spent[-1].epsilon == result.summary["epsilon"]
    assert (promise.unit, promise.noised_by, promise.relation) == ("client", "server", "add-remove")
    assert promise.sampling == {"scheme": "poisson", "rate": 0.5}
    assert promise.adaptive and promise.seeded_noise and not promise.in_the_clear
    # The state after n rounds holds the clip of the next one.
    state = Checkpoints(tmp_path / "run" / "checkpoints", 2).load(2)
    assert state is not None
    (moved,) = (own["clip"] for own in state.states if "clip" in own)
    assert spent[0].clip == 0.1 and spent[1].clip != 0.1 and spent[2].clip == float(moved)


def test_a_clip_that_stands_still_is_told_as_it_is(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "run", {"local_gaussian": {"clip": 0.3}}, evaluation={"private": False, "metrics": []})
    (promise,) = (event for event in events(tmp_path / "run") if isinstance(event, PrivacyPromised))
    assert promise.noised_by == "client" and promise.in_the_clear and not promise.adaptive
    assert [event.clip for event in events(tmp_path / "run") if isinstance(event, PrivacySpent)] == [0.3] * 3
