"""What a run says of its own privacy: the promise before the first round, and what each round spent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fedllm
from fedllm.events import PrivacyPromised, PrivacySpent
from fedllm.experiment.checks.privacy import check_privacy
from fedllm.runs.checkpoints import Checkpoints
from fedllm.runs.privacy_words import privacy_lines
from tests.runs.small import SIZES, events, small, write_records

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


def said(data: Path, stages: list[Any], **changes: Any) -> dict[str, str]:
    """What `check` prints of a private experiment; of warnings all together."""
    exp = small(data, stages=stages, demands={"privacy": {"target_epsilon": 8.0}}, evaluation={}, **changes)
    plan = check_privacy(exp, SIZES)
    assert plan is not None
    lines: dict[str, str] = {}
    for name, text in privacy_lines(plan):
        lines[name] = f"{lines.get(name, '')}{text}\n"
    return lines


GAUSSIAN: list[Any] = [UNIFORM, {"gaussian_dp": {"clip": 0.5}}]
BOTH = "both factors of lora are noised"


def test_check_says_whom_it_protects_and_what_that_takes(data: Path) -> None:
    lines = said(data, GAUSSIAN, federation__shards__sampling={"poisson": 0.5})
    assert "protects all that one client holds against everybody who sees the models" in lines["privacy"]
    assert "each client by a coin of 0.5; nobody who sees the model may know who took part" in lines["sampling"]
    assert "after 1 round" in lines["epsilon"] and "after 3, at delta 1e-05 (add-remove, pld)" in lines["epsilon"]
    assert "x the clip 0.5 on every value of the sum of a round" in lines["noise"]
    assert "a round adds up 1.5 clips at most" in lines["warning"] and "nothing is evaluated" in lines["warning"]


def test_the_noise_of_a_correlated_run_is_told_with_what_one_client_can_change(data: Path) -> None:
    """Three rounds, one part: sqrt(1 + 1/4 + 9/64) = 1.179."""
    stages = [UNIFORM, {"dp_ftrl": {"clip": 0.5, "separation": 3}}]
    lines = said(data, stages, federation__shards__sampling={"rotation": 1})
    assert "x 1.179, what one client can change in the whole run, x the clip 0.5" in lines["noise"]
    assert "in turn, 3 rounds apart; who takes part need not be secret" in lines["sampling"]


@pytest.mark.parametrize(
    ("stages", "scope", "warned"),
    [
        (GAUSSIAN, {}, True),
        (GAUSSIAN, {"freeze": ["*lora_A"]}, False),
        (["lora_svd", *GAUSSIAN], {"hold": ["*lora_A"]}, False),
        (GAUSSIAN, {"alternate": ["*lora_B", "*lora_A"]}, False),
        (GAUSSIAN, {"share": ["*lora_B"]}, False),
        (["lora_product", *GAUSSIAN], {}, False),
    ],
)
def test_the_warning_of_two_noised_factors(data: Path, stages: list[Any], scope: dict[str, Any], warned: bool) -> None:
    assert (BOTH in said(data, stages, task__scope=scope)["warning"]) == warned


def test_where_clients_add_the_noise_chance_is_not_counted_on(data: Path) -> None:
    lines = said(data, [UNIFORM, {"local_gaussian": {"clip": 0.5}}], federation__shards__sampling={"poisson": 0.5})
    assert "against the server, the other clients and everybody" in lines["privacy"]
    assert "it makes no difference" in lines["sampling"] and "what a client sends" in lines["noise"]
