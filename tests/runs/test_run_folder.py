"""Who may write into a run folder, and what happens when a run is started again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import fedllm
from fedllm.engines.base import Engine
from fedllm.errors import RunError
from fedllm.events import RoundFinished, RoundStarted, RunStarted
from fedllm.experiment.config_file import experiment_hash
from fedllm.experiment.record import Experiment
from fedllm.report.run_history import effective
from fedllm.runs.checkpoints import Checkpoints
from fedllm.runs.folder import Folder, default_folder
from tests.runs.small import SIZES, Stop, StopAt, adapter_hash, events, history, small, spec


@pytest.fixture
def unfinished(data: Path, tmp_path: Path) -> Path:
    """One round of `small(data)` is complete."""
    stop = StopAt(lambda event: isinstance(event, RoundStarted) and event.round == 1)
    with pytest.raises(Stop):
        fedllm.run(small(data), out=tmp_path / "unfinished", name="small", listeners=[stop])
    return tmp_path / "unfinished"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_default_folder_carries_name_and_hash(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    experiment = small(data, rounds=0)
    result = fedllm.run(experiment, name="mine")
    assert (
        result.folder == Path("runs") / f"mine-{experiment_hash(experiment)[:8]}" == default_folder(experiment, "mine")
    )
    assert result.summary["experiment_hash"] == experiment_hash(experiment)


def test_the_folder_holds_what_it_promises(finished: fedllm.Result) -> None:
    found = {path.name for path in finished.folder.iterdir()}
    assert found == {"experiment.yaml", "events.jsonl", "summary.json", "checkpoints", "adapter"}
    assert {path.name for path in (finished.folder / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_the_resolved_file_is_the_experiment(data: Path, finished: fedllm.Result) -> None:
    text = (finished.folder / "experiment.yaml").read_text(encoding="utf-8")
    assert fedllm.build(yaml.safe_load(text)) == small(data)
    about = yaml.safe_load(text)["about"]
    assert about["name"] == "small"
    assert about["experiment_hash"] == experiment_hash(small(data))
    assert about["versions"]["fedllm"] == fedllm.__version__
    assert "momentum: 0.0" in text, "defaults are written out"


def test_summary_holds_the_promised_keys(finished: fedllm.Result) -> None:
    promised = {
        *("experiment_hash", "engine", "rounds", "seconds", "seconds_per_round", "tokens_trained"),
        *("tokens_per_second", "bytes_up", "bytes_down", "peak_rss_bytes", "eval", "clients", "epsilon"),
    }
    summary = json.loads((finished.folder / "summary.json").read_text(encoding="utf-8"))
    assert promised <= summary.keys()
    assert summary["eval"].keys() == {"base", "federated", "local_only", "fedavg", "centralised"}
    assert summary["eval"]["local_only"] is None and summary["eval"]["centralised"] is None
    assert summary["epsilon"] is None
    assert {client: figures["train"] for client, figures in summary["clients"].items()} == SIZES
    assert summary == finished.summary
    assert summary["rounds"] == 3


def test_a_finished_run_is_returned_as_it_is(data: Path, finished: fedllm.Result) -> None:
    before = contents(finished.folder)
    for resume in (False, True):
        again = fedllm.run(small(data), out=finished.folder, resume=resume, engine="serial", name="other")
        assert again.summary == finished.summary
        assert again.params.keys() == finished.params.keys()
    assert contents(finished.folder) == before


def test_an_unfinished_run_is_not_begun_anew(data: Path, unfinished: Path) -> None:
    before = contents(unfinished)
    with pytest.raises(RunError, match="unfinished; go on with --resume"):
        fedllm.run(small(data), out=unfinished)
    assert contents(unfinished) == before


@pytest.mark.parametrize("resume", [False, True])
def test_another_experiment_is_refused_with_both_values(data: Path, unfinished: Path, resume: bool) -> None:
    before = contents(unfinished)
    with pytest.raises(RunError) as refused:
        fedllm.run(small(data, rounds=4, work__sgd__lr=0.25), out=unfinished, resume=resume)
    text = str(refused.value)
    assert "another experiment" in text
    assert "rounds: 3 there, 4 here" in text
    assert "work.sgd.lr: 0.1 there, 0.25 here" in text
    assert contents(unfinished) == before


def test_other_files_are_never_written_among(data: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for resume in (False, True):
        with pytest.raises(RunError, match="other files"):
            fedllm.run(small(data), out=tmp_path, resume=resume)
    with pytest.raises(RunError, match="is a file"):
        fedllm.run(small(data), out=tmp_path / "thesis.tex")
    assert contents(tmp_path) == {"thesis.tex": b"years of work"}


def test_resume_without_a_run_starts_one(data: Path, tmp_path: Path, finished: fedllm.Result) -> None:
    (tmp_path / "run").mkdir()
    fedllm.run(small(data), out=tmp_path / "run", name="small", resume=True)
    assert adapter_hash(tmp_path / "run") == adapter_hash(finished.folder)


def test_a_start_that_was_cut_off_begins_anew(data: Path, tmp_path: Path, finished: fedllm.Result) -> None:
    with pytest.raises(Stop):
        fedllm.run(small(data), out=tmp_path, name="small", listeners=[StopAt(lambda event: True, 1)])
    assert Checkpoints(tmp_path / "checkpoints", 2).rounds() == []
    fedllm.run(small(data), out=tmp_path, name="small", resume=True)
    assert history(tmp_path) == history(finished.folder)
    assert len([event for event in events(tmp_path) if isinstance(event, RunStarted)]) == 1


def test_a_half_written_experiment_is_no_other_file(data: Path, tmp_path: Path) -> None:
    (tmp_path / "experiment.yaml.part").write_text("task: {mod")
    assert Folder(tmp_path).status(small(data)) == "new"


def test_a_damaged_experiment_is_refused(data: Path, tmp_path: Path) -> None:
    for text in ("", "[1", "- a"):
        (tmp_path / "experiment.yaml").write_text(text)
        with pytest.raises(RunError, match="damaged"):
            fedllm.run(small(data), out=tmp_path, resume=True)


def test_what_fails_before_the_first_checkpoint_leaves_nothing(data: Path, tmp_path: Path) -> None:
    with pytest.raises(fedllm.errors.FedllmError):
        fedllm.run(small(data, evaluation__metrics=["accuracy"]), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_engine_and_folder_are_no_part_of_the_hash(data: Path, tmp_path: Path) -> None:
    class Renamed(Engine):
        """The serial engine under another name."""

        def open(self, *arguments: Any) -> Any:
            from fedllm.engines.serial import Serial

            return Serial().open(*arguments)

    one = fedllm.run(small(data, rounds=1), out=tmp_path / "a", engine="serial")
    two = fedllm.run(small(data, rounds=1), out=tmp_path / "b", engine=Renamed())
    assert one.summary["experiment_hash"] == two.summary["experiment_hash"]
    assert (one.summary["engine"], two.summary["engine"]) == ("serial", "renamed")
    assert adapter_hash(one.folder) == adapter_hash(two.folder)


def test_from_python_as_the_readme_shows(data: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(spec(data, rounds=1)), encoding="utf-8")
    result = fedllm.run(fedllm.load(tmp_path / "mine.yaml"), out=tmp_path / "run")
    assert isinstance(result, fedllm.Result)
    assert isinstance(fedllm.load(tmp_path / "mine.yaml"), Experiment)
    assert result.folder == tmp_path / "run"
    leaves = [f"{layer}.{target}" for layer in (0, 1) for target in ("q_proj.lora_A", "v_proj.lora_B")]
    assert {name.removeprefix("model.layers.").replace("self_attn.", "") for name in result.params} > set(leaves)
    assert len(result.params) == 8
    last = [event for event in effective(events(tmp_path / "run")) if isinstance(event, RoundFinished)]
    assert [event.clients for event in last] == [3]


def test_figures_of_the_summary_are_those_of_the_log(finished: fedllm.Result) -> None:
    rounds = [event for event in events(finished.folder) if isinstance(event, RoundFinished)]
    summary = finished.summary
    assert summary["tokens_trained"] == sum(event.tokens for event in rounds) > 0
    assert summary["bytes_up"] == sum(event.bytes_up for event in rounds) > 0
    assert summary["bytes_down"] == sum(event.bytes_down for event in rounds) > 0
    per_round = sum(event.seconds for event in rounds) / 3
    assert summary["seconds_per_round"] == pytest.approx(per_round, abs=2e-4)
    assert summary["tokens_per_second"] == pytest.approx(summary["tokens_trained"] / (3 * per_round), rel=0.01)
    assert sys.platform != "linux" or 50 << 20 < summary["peak_rss_bytes"] < 20 << 30
