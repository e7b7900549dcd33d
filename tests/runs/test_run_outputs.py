"""What a finished run is good for: its adapter in other tools, its scores again, a talk with it, a page about it."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fedllm
from fedllm.cli.chat import chat_with
from fedllm.cli.evaluate import evaluate_run
from fedllm.cli.report import report_runs
from fedllm.errors import ConfigError, RunError
from fedllm.runs.export import export
from fedllm.runs.loaded_run import LoadedRun, open_run
from tests.runs.small import SIZES, small, write_records

TOKENS = torch.tensor([[256, 104, 105, 10, 63, 32, 97, 98, 99, 257]])


@pytest.fixture
def run(finished: fedllm.Result, tmp_path: Path) -> Path:
    """A copy of the finished run, to write into."""
    shutil.copytree(finished.folder, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def opened(finished: fedllm.Result) -> LoadedRun:
    return open_run(finished.folder)


def own_logits(opened: LoadedRun) -> torch.Tensor:
    """(V,) of the token after TOKENS, by fedllm."""
    with torch.no_grad():
        return opened.model.adapter.logits(opened.params, TOKENS, torch.ones_like(TOKENS), None)[0][0]


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=TOKENS).logits[0, -1]
    return found


def test_the_adapter_loads_in_peft(opened: LoadedRun, run: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    config = json.loads((run / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    base = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"])
    plain = logits(base)
    for folder in (run / "adapter", export(run, "peft", out=tmp_path / "exported")):
        tuned = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.name_or_path), folder))
        assert torch.allclose(tuned, own_logits(opened), atol=1e-5)
        assert not torch.allclose(tuned, plain, atol=1e-2), "the adapter does something"


def test_the_merged_model_needs_nothing_of_fedllm(opened: LoadedRun, run: Path) -> None:
    folder = export(run, "merged")
    assert folder == run / "export-merged"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__module__.startswith("transformers.")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.allclose(logits(model), own_logits(opened), atol=1e-5)
    assert AutoTokenizer.from_pretrained(folder)("hi").input_ids == [104, 105]
    assert export(run, "merged") == folder, "the run's own export is written again"


def test_export_never_writes_over_what_is_there(run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    export(run, "peft", out=tmp_path / "mine")
    before = (tmp_path / "mine" / "adapter_config.json").read_bytes()
    for form in ("peft", "merged"):
        with pytest.raises(RunError, match="is there already"):
            export(run, form, out=tmp_path / "mine")
    with pytest.raises(RunError, match="is there already"):
        export(run, "peft", out=run / "summary.json")
    assert (tmp_path / "mine" / "adapter_config.json").read_bytes() == before
    with pytest.raises(ConfigError, match="no export 'pft'; did you mean 'peft'"):
        export(run, "pft", out=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_eval_says_again_what_the_run_said(run: Path, finished: fedllm.Result) -> None:
    evaluate_run(run, [], best=False)
    kept = json.loads((run / "eval.json").read_text(encoding="utf-8"))
    assert kept["round"] == 3
    assert kept["scores"]["all"] == finished.summary["eval"]["federated"]
    for client in SIZES:
        assert kept["scores"][client] == finished.summary["clients"][client]["eval"]


def test_eval_takes_other_measures_and_nothing_else(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate_run(run, ["evaluation.metrics=[exact_match, perplexity]", "evaluation.max_new_tokens=2"], best=False)
    kept = json.loads((run / "eval.json").read_text(encoding="utf-8"))
    assert kept["scores"]["ann"].keys() == {"exact_match", "perplexity"}
    assert kept["evaluation"]["max_new_tokens"] == 2
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["client", *SIZES, "all"]
    with pytest.raises(ConfigError, match=r"'rounds=9' cannot change a run that is trained"):
        evaluate_run(run, ["rounds=9"], best=False)
    with pytest.raises(ConfigError, match="unknown metric 'nlll'; did you mean 'nll'"):
        evaluate_run(run, ["evaluation.metrics=[nlll]"], best=False)


def talk(run: Path, capsys: pytest.CaptureFixture[str], prompt: str | None, compare: bool = False) -> list[str]:
    capsys.readouterr()
    chat_with(run, prompt=prompt, client=None, compare=compare, system="Answer.", max_new_tokens=4)
    return capsys.readouterr().out.removesuffix("\n").split("\n")


def expected(opened: LoadedRun, *turns: tuple[str, str], tuned: bool = True) -> str:
    """The answer of the model to turns of a talk."""
    messages = [{"role": role, "content": content} for role, content in turns]
    prompt = opened.model.prompt({"messages": [*messages, {"role": "assistant", "content": "x"}]})
    return opened.model.generate(opened.params if tuned else {}, [prompt], 4)[0].strip()


def shown(text: str) -> list[str]:
    """Lines of a terminal: control characters are blanks."""
    return ["".join(char if char.isprintable() else " " for char in line) for line in text.split("\n")]


def test_chat_answers_one_prompt(run: Path, opened: LoadedRun, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [("system", "Answer."), ("user", "ann 3?")]
    tuned, base = expected(opened, *asked), expected(opened, *asked, tuned=False)
    assert tuned != base
    assert talk(run, capsys, "ann 3?") == shown(tuned)
    assert talk(run, capsys, "ann 3?", compare=True) == [*shown(f"base   {base}"), *shown(f"tuned  {tuned}")]


def test_chat_answers_a_pipe_line_by_line(
    run: Path, opened: LoadedRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("ann 3?\n\nben 1?\n"))
    first = [("system", "Answer."), ("user", "ann 3?")]
    answer = expected(opened, *first)
    second = expected(opened, *first, ("assistant", answer), ("user", "ben 1?"))
    assert talk(run, capsys, None) == [*shown(answer), *shown(second)]


def test_chat_does_without_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_records(tmp_path / "people.jsonl")
    fedllm.run(small(path, rounds=0, evaluation__metrics=[]), out=tmp_path / "run")
    path.unlink()
    chat_with(tmp_path / "run", prompt="hi", client=None, compare=False, system=None, max_new_tokens=1)
    assert len(capsys.readouterr().out.splitlines()) <= 2


def test_report_is_one_page(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report_runs([run], out=None)
    report_runs([run, run], out=tmp_path / "both.html")
    assert capsys.readouterr().out.splitlines() == [
        f"written: {run / 'report.html'}",
        f"written: {tmp_path / 'both.html'}",
    ]
    assert "<title>" in (run / "report.html").read_text(encoding="utf-8")
    with pytest.raises(RunError, match="holds no events"):
        report_runs([tmp_path], out=None)


@pytest.mark.slow
def test_training_imports_only_what_it_needs(data: Path, tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps({"data": str(data), "out": str(tmp_path / "run")}))
    program = """
import json, sys
import fedllm
from tests.runs.small import small
given = json.load(open(sys.argv[1]))
fedllm.run(small(given["data"], rounds=1, evaluation__compare=["local_only"]), out=given["out"])
heavy = ("datasets", "pandas", "plotly", "pyarrow", "flwr_datasets", "peft", "sklearn", "matplotlib")
print(json.dumps([name for name in heavy if name in sys.modules] + [n for n in ("torch",) if n not in sys.modules]))
"""
    command = [sys.executable, "-c", program, str(tmp_path / "one.json")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []
