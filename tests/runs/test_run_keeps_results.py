"""Whatever goes wrong beside the rounds costs a run neither its adapter nor its summary; and nothing that is no result
passes for one."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fedllm
from fedllm.cli import run
from fedllm.errors import RunError
from fedllm.evaluation.diagnostics.cohort import CohortStatistics
from fedllm.events import Evaluated, Event, RoundStarted, Warned
from fedllm.models.base_models.load import load_base
from fedllm.models.loaded_model import load
from fedllm.runs import launch, server_round
from fedllm.runs.baselines import Baselines
from fedllm.runs.folder import Folder
from fedllm.runs.loaded_run import open_run
from tests.runs.small import Stop, StopAt, adapter_hash, command, events, figures, history, small, stateful


def stopped(experiment: Any, out: Path, *, round: int = 2) -> Path:
    """A run that a crash has ended before this round."""
    with pytest.raises(Stop):
        stop = StopAt(lambda event: isinstance(event, RoundStarted) and event.round == round)
        fedllm.run(experiment, out=out, name="small", listeners=[stop])
    return out


def warned(folder: Path) -> list[str]:
    return [event.text for event in events(folder) if isinstance(event, Warned)]


def test_nothing_beside_the_rounds_costs_a_run_its_outputs(
    data: Path, tmp_path: Path, finished: fedllm.Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> Any:
        raise KeyError("own/nll")

    def late(*_: object) -> Any:
        assert adapter_hash(tmp_path / "run") == adapter_hash(finished.folder)  # it is there before
        raise ZeroDivisionError

    monkeypatch.setattr(Baselines, "local_only", late)
    monkeypatch.setattr(Baselines, "centralised", broken)
    monkeypatch.setattr(CohortStatistics, "diagnosed", broken)
    monkeypatch.setattr(server_round, "evaluate", broken)
    made = fedllm.run(small(data, evaluation__compare=["local_only", "centralised"]), out=tmp_path / "run")
    assert adapter_hash(tmp_path / "run") == adapter_hash(finished.folder)
    assert made.summary["eval"]["base"] is not None and made.summary["eval"]["federated"] is None
    assert made.summary["failure"] is None
    said = "\n".join(warned(tmp_path / "run"))
    assert "local_only has no figures: ZeroDivisionError" in said
    assert "centralised has no figures: KeyError: 'own/nll'" in said
    for round in (1, 2, 3):
        assert f"round {round} has no diagnostics: KeyError" in said
        assert f"the evaluation after round {round} has no figures: KeyError" in said


def test_a_report_that_fails_costs_nothing(
    data: Path, tmp_path: Path, finished: fedllm.Result, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    folder = shutil.copytree(finished.folder, tmp_path / "run")
    monkeypatch.setattr(run, "write_report", lambda *_: math.sqrt(-1))
    code, out, _ = command(capsys, "run", folder / "experiment.yaml", "--out", folder)
    assert code == 0
    assert "tokens" in out and "There is no report: ValueError" in out and f"fedllm report {folder}" in out


def test_a_diverged_run_has_null_and_a_report(data: Path, tmp_path: Path, capsys: Any) -> None:
    """Half precision overflows: losses and scores are no numbers."""
    changes = {
        "task__dtype": "float16",
        "work__sgd__lr": 1e4,
        "rounds": 2,
        "evaluation__metrics": ["nll", "perplexity"],
    }
    made = fedllm.run(small(data, **changes), out=tmp_path / "run")
    scores = [event for event in events(tmp_path / "run") if isinstance(event, Evaluated)]
    assert scores[0].metrics["nll"] is not None and scores[-1].metrics["nll"] is None, "the case that is tested"
    assert made.summary["eval"]["federated"] == {"nll": None, "perplexity": None}
    for path in (tmp_path / "run").rglob("*.json*"):
        for line in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} in a file"))
    assert command(capsys, "report", tmp_path / "run")[0] == 0
    assert "NaN" not in (tmp_path / "run" / "report.html").read_text().rpartition("</script>")[0][-20000:]


def test_status_is_read_again_under_the_lock(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process begins in the folder between the first look at it and the lock."""
    loaded, out = launch._loaded, tmp_path / "run"

    def meanwhile(experiment: Any) -> Any:
        monkeypatch.setattr(launch, "_loaded", loaded)
        stopped(small(data, rounds=1, work__sgd__lr=0.05), out, round=0)
        return loaded(experiment)

    monkeypatch.setattr(launch, "_loaded", meanwhile)
    with pytest.raises(RunError, match=r"holds another experiment \(work.sgd.lr: 0.05 there, 0.1 here\)"):
        fedllm.run(small(data, rounds=1), out=out, resume=True)
    fedllm.run(small(data, rounds=1, work__sgd__lr=0.05), out=out, resume=True)  # whose run is whole


def test_a_memory_that_is_gone_is_refused(data: Path, tmp_path: Path) -> None:
    experiment = stateful(data, evaluation__metrics=[])
    out = stopped(experiment, tmp_path / "run", round=1)
    memory = out / "checkpoints" / "clients" / "ben"
    for remove in (lambda: max(memory.glob("*.safetensors")).unlink(), lambda: shutil.rmtree(memory)):
        remove()  # the newest, then all
        with pytest.raises(RunError, match="what client ben remembered after round 1 is gone"):
            fedllm.run(experiment, out=out, resume=True)
    with pytest.raises(RunError, match="what client ben remembered after round 1 is gone"):
        open_run(out)


@pytest.fixture
def own(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An experiment on data and a model of its own, which a test may change."""
    (tmp_path / "mine.jsonl").write_bytes(data.read_bytes())
    base = load_base("tiny-llama")
    base.model.save_pretrained(tmp_path / "model")
    base.tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    yield small("mine.jsonl", task__model="model", federation__shards__heldout=str(data), rounds=1)
    load.cache_clear()


def change_data() -> None:
    text = Path("mine.jsonl").read_text()
    Path("mine.jsonl").write_text(text.replace("ben 1?", "ben 9?"))


def change_model() -> None:
    base = load_base("model")
    with torch.no_grad():
        base.model.get_input_embeddings().weight[5, 7] += 0.125
    base.model.save_pretrained("model")


@pytest.mark.parametrize(
    ("change", "name"), [(change_data, "the data file mine.jsonl"), (change_model, "base model model")]
)
def test_changed_inputs_are_named(own: Any, change: Any, name: str) -> None:
    out = Path("run")
    heard: list[Event] = []
    stopped(own, out, round=0)
    fedllm.run(own, out=out, resume=True)
    copied = shutil.copytree(out, Path("unfinished"))
    Folder(copied).summary.unlink()
    for file in Path("model").iterdir():
        file.touch()  # other times, the same content
    fedllm.run(own, out=out, listeners=[heard.append])
    assert heard == []
    before = (figures(out), history(out))
    change()
    fedllm.run(own, out=out, listeners=[heard.append])
    (told,) = heard
    assert isinstance(told, Warned) and f"{name} changed; its figures are of what was there before" in told.text
    with pytest.raises(RunError, match=rf"since the run in unfinished began, .*{name} changed.* put back"):
        fedllm.run(own, out=copied, resume=True)
    assert (figures(out), history(out)) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "EXPERIMENT", "--out", "/dev/null/x"], r"cannot be made .*choose another folder with --out"),
        (["report", "RUN", "--out", "/dev/null/x.html"], r"x.html could not be written .*choose a place"),
        (["export", "RUN", "--to", "peft", "--out", "/dev/null/x"], r"x could not be written .*choose a place"),
    ],
)
def test_a_place_that_cannot_be_written_to_is_one_true_sentence(
    finished: fedllm.Result, capsys: Any, words: list[str], said: str
) -> None:
    places = {"RUN": str(finished.folder), "EXPERIMENT": str(finished.folder / "experiment.yaml")}
    code, _, err = command(capsys, *(places.get(word, word) for word in words))
    assert code == 2 and len(err.splitlines()) == 1
    assert "resume" not in err and "room" not in err
    assert re.search(said, err)
