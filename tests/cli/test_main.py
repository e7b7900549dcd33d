"""The command line from end to end: run, show again, stop, resume, and every verb on what a run leaves behind."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import fedllm
from fedllm.cli import run
from fedllm.cli.display import Display
from fedllm.cli.next_steps import next_steps
from fedllm.data.records import PACKAGED
from fedllm.events import Event, MessageSent, RoundStarted
from fedllm.experiment.catalog import NOUNS
from fedllm.experiment.config_file import experiment_hash, override
from fedllm.experiment.methods import METHODS
from fedllm.models.base_models.load import ALIASES
from fedllm.models.base_models.tiny_llama import tiny_model
from fedllm.stages.base import Stage
from tests.runs.small import adapter_hash, command, events, history, rounds_run_again, small

Captured = pytest.CaptureFixture[str]


def test_a_run_shows_reports_and_is_shown_again(here: Path, capsys: Captured) -> None:
    code, out, err = command(capsys, "run", "mine.yaml", "rounds=2")
    assert (code, err) == (0, "")
    (folder,) = (here / "runs").iterdir()
    assert folder.name == f"mine-{experiment_hash(small('people.jsonl', rounds=2))[:8]}"
    for line in ("mine · tiny random Llama · batched: 2 rounds, 3 clients", "round 1/2", "round 2/2", "federated"):
        assert line in out
    assert f"Report: runs/{folder.name}/report.html" in out
    assert f"fedllm chat runs/{folder.name} --compare" in out
    assert (folder / "report.html").is_file()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    for again in ([], ["--resume"]):
        code, told, err = command(capsys, "run", "mine.yaml", "rounds=2", *again)
        assert (code, err) == (0, "")
        assert "finished" in told and "round 1/2" not in told and "own-data" not in told
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        assert f"{summary['eval']['federated']['nll']:.3f}" in told
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


class Impatient(Display):
    """A display whose reader presses Ctrl-C in the middle of the second round."""

    def __call__(self, event: Event) -> None:
        super().__call__(event)
        if isinstance(event, MessageSent) and event.round == 1 and event.direction == "up" and event.call == "work":
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_prints_the_line_that_resumes(here: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["mine.yaml", "evaluation.metrics=[nll, perplexity]", "--out", "two words"]
    with monkeypatch.context() as patch:
        patch.setattr(run, "Display", Impatient)
        code, _, err = command(capsys, "run", *words)
    assert code == 130
    assert "1 complete round is saved in two words" in err and "Traceback" not in err
    line = shlex.split(err.splitlines()[-1])
    assert line[0] == "fedllm" and line[-1] == "--resume"
    assert [event.round for event in events(here / "two words") if isinstance(event, RoundStarted)] == [0, 1]

    code, _, err = command(capsys, "run", *words)
    assert code == 2
    assert err.strip().endswith(shlex.join(line)), "without --resume the same line is shown"

    code, out, err = command(capsys, *line[1:])
    assert (code, err) == (0, "")
    assert "mine · tiny random Llama · batched" in out and "round 3/3" in out and "round 1/3" not in out
    assert rounds_run_again(here / "two words") == []
    assert command(capsys, "run", *words[:2], "--out", "whole")[0] == 0
    assert adapter_hash(here / "two words") == adapter_hash(here / "whole")
    named = [{key: value for key, value in event.items() if key != "name"} for event in history(here / "two words")]
    assert named == [{key: value for key, value in event.items() if key != "name"} for event in history(here / "whole")]


def test_ctrl_c_before_the_run_begins_leaves_nothing(
    here: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("fedllm.runs.launch.load", slow)
    code, out, err = command(capsys, "run", "mine.yaml")
    assert (code, out) == (130, "")
    assert "Traceback" not in err
    assert not (here / "runs").exists()


def test_overrides_change_the_experiment_and_its_folder(here: Path, capsys: Captured) -> None:
    changes = ["rounds=1", "work.sgd.lr=1e-3", "evaluation.metrics=[]", "task.adapter.lora.rank=3"]
    assert command(capsys, "run", "mine.yaml", *changes)[0] == 0
    (folder,) = (here / "runs").iterdir()
    written = yaml.safe_load((folder / "experiment.yaml").read_text(encoding="utf-8"))
    assert written["work"]["sgd"]["lr"] == 0.001
    assert written["task"]["adapter"]["lora"]["rank"] == 3
    changed = small("people.jsonl", rounds=1, work__sgd__lr=1e-3, evaluation__metrics=[], task__adapter__lora__rank=3)
    assert written["about"]["experiment_hash"] == experiment_hash(changed)


def test_each_verb_on_a_finished_run(here: Path, capsys: Captured) -> None:
    assert command(capsys, "run", "mine.yaml", "--out", "run", 'task.scope.share=["*lora_A"]')[0] == 0
    summary = json.loads((here / "run" / "summary.json").read_text(encoding="utf-8"))

    code, out, err = command(capsys, "eval", "run")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == ["client", "ann", "ben", "cid", "all"]
    assert f"{summary['eval']['federated']['nll']:.4f}" in out.splitlines()[-1]

    for client in ([], ["--client", "ben"]):
        code, out, err = command(capsys, "export", "run", "--to", "peft", *client)
        assert (code, err) == (0, "")
        place = here / out.strip().removeprefix("written: ")
        assert (place / "adapter_model.safetensors").read_bytes() == (
            here / "run" / ("clients/ben/adapter" if client else "adapter") / "adapter_model.safetensors"
        ).read_bytes()

    code, out, err = command(capsys, "export", "run", "--to", "merged", "--out", "model", "--client", "ben")
    assert (code, out.strip(), err) == (0, "written: model", "")
    assert (here / "model" / "model.safetensors").is_file()

    code, out, err = command(capsys, "chat", "run", "--prompt", "hi", "--compare", "--max-new-tokens", "2")
    assert (code, err) == (0, "")
    assert out.startswith("base") and "\ntuned" in out

    code, out, err = command(capsys, "report", "run", "run", "--out", "page.html")
    assert (code, out.strip(), err) == (0, "written: page.html", "")
    assert (here / "page.html").is_file()


def test_check_says_what_would_happen_and_writes_nothing(here: Path, capsys: Captured) -> None:
    code, out, err = command(capsys, "check", "mine.yaml", "federation.shards.sampling={poisson: {rate: 0.5}}")
    assert (code, err) == (0, "")
    lines = dict(line.split(maxsplit=1) for line in out.splitlines()[:-1])
    assert out.splitlines()[-1] == "ok"
    assert lines["records"] == "11 to train on, 11 held out"
    assert lines["model"] == "tiny-llama"
    told = [f"{key}={lines[key.rpartition('.')[2]]}" for key in ("task.adapter", "work", "stages")]
    assert override(small("people.jsonl"), told) == small("people.jsonl"), "settings are YAML that an override takes"
    assert lines["server"] == "combines the clients' updates, and could read each of them"
    assert lines["clients"].startswith("3, ")
    experiment = small("people.jsonl", federation__shards__sampling={"poisson": {"rate": 0.5}})
    cohort = experiment.federation.sample(("ann", "ben", "cid"), 0, experiment.key)
    assert lines["clients"] == f"3, {len(cohort)} in the first of 3 rounds"
    assert lines["folder"] == f"runs/mine-{experiment_hash(experiment)[:8]}"
    assert {path.name for path in here.iterdir()} == {"people.jsonl", "mine.yaml"}


def frozen(capsys: Captured, *settings: str) -> str | None:
    code, out, err = command(capsys, "check", "mine.yaml", *settings)
    assert (code, err) == (0, "")
    return dict(line.split(maxsplit=1) for line in out.splitlines()[:-1]).get("frozen")


def test_check_says_what_moving_the_frozen_weights_takes(here: Path, capsys: Captured) -> None:
    """By hand: three clients of rank 2, two layers of q_proj, 64 x 64; 0.1 M values in matrices of two dimensions."""
    layers = ("task.adapter.lora.targets=[q_proj]", "task.adapter.lora.rank=2")
    assert frozen(capsys, *layers) is None
    told = frozen(capsys, "stages=[lora_merge, by_examples]", *layers) or ""
    size = 4 * 6 * (64 + 64) * 2
    assert told.startswith(f"a step of rank 6 after each round of 3 clients: {size / 1024:.0f} KiB down to a client")
    assert "32 KiB at most" in told and told.endswith("0% of a local step's products on a base in float32")
    matrices = sum(leaf.numel() for leaf in tiny_model(torch.float32).parameters() if leaf.dim() == 2)
    moved, trained = 2 * 64 * 64, 2 * 2 * 128
    share = 4 * moved / (4 * matrices + 6 * trained + 4 * moved)
    told = frozen(capsys, "stages=[lora_merge, by_examples]", "task.dtype=bfloat16", *layers) or ""
    assert told.endswith(f"{share:.0%} of a local step's products on a base in bfloat16") and share > 0.05
    sparse = ("stages=[{sparse_first: 2}, by_examples]", "task.adapter={sparse_lora: {rank: 2, targets: [q_proj]}}")
    size = 4 * 2 * (round(0.01 * 64 * 64) + 2 * 128)
    assert (frozen(capsys, *sparse) or "").startswith(f"a step: {size / 1024:.3g} KiB down once; 0% of")
    told = frozen(capsys, "stages=[lora_merge, by_examples]", "task.model=some/model", *layers) or ""
    assert told.endswith("its bytes are known once some/model is on this machine")


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("methods", METHODS),
        ("stages", NOUNS[Stage]),
        ("models", ALIASES),
        ("data", PACKAGED),
        ("aggregators", ["sum"]),
        ("works", ["sgd"]),
        ("recipes", ["quickstart"]),
    ],
)
def test_ls_names_everything(capsys: Captured, what: str, names: Any) -> None:
    code, out, err = command(capsys, "ls", what)
    assert (code, err) == (0, "")
    first = {line.split()[0] for line in out.splitlines() if line.split()}
    assert set(names) <= first


def test_ls_methods_says_which_cannot_be_batched(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    _, out, _ = command(capsys, "ls", "methods")
    alone = {line.split()[0] for line in out.splitlines() if "not batchable" in line}
    assert alone == {"full"}, "its adapter trains one client at a time"


def test_ls_schema_is_json(capsys: Captured) -> None:
    code, out, err = command(capsys, "ls", "schema")
    assert (code, err) == (0, "")
    assert {"task", "federation", "rounds", "method"} <= json.loads(out)["properties"].keys()


def test_without_a_verb_there_is_help(capsys: Captured) -> None:
    code, out, err = command(capsys)
    assert "Usage: " in out and "run" in out
    assert (code, err) == (2, "")
    for words in (["--help"], ["run", "--help"], ["chat", "--help"]):
        code, out, err = command(capsys, *words)
        assert (code, err) == (0, "")
        assert out.startswith("Usage: ")


def test_what_is_light_needs_no_torch(tmp_path: Path) -> None:
    program = """
import sys
sys.argv = ["fedllm", *sys.argv[1:]]
from fedllm.cli.main import main
try:
    main()
except SystemExit as end:
    heavy = {"torch", "transformers", "numpy", "plotly"} & sys.modules.keys()
    print("END", end.code, sorted(heavy))
"""
    light = (["--help"], ["run", "--help"], ["runn"], ["--version"], ["init", "quickstart"])
    for words in light:
        run = [sys.executable, "-c", program, *words]
        done = subprocess.run(run, capture_output=True, text=True, check=True, cwd=tmp_path)
        assert done.stdout.splitlines()[-1] == f"END {2 if words == ['runn'] else 0} []"


def test_a_run_says_that_it_loads_before_it_imports_torch() -> None:
    """The order of the two, as a pipe sees it."""
    program = """
import os, sys
sys.argv = ["fedllm", "run", "quickstart"]
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "transformers", "numpy"):
            os.write(1, f"IMPORT {name}\\n".encode())
            os._exit(0)  # whatever was printed and not flushed is lost
sys.meta_path.insert(0, Watch())
from fedllm.cli.main import main
main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first == "loading PyTorch, then quickstart" and second.startswith("IMPORT ")


def test_version(capsys: Captured) -> None:
    assert command(capsys, "--version") == (0, f"fedllm {fedllm.__version__}\n", "")
    code, out, err = command(capsys, "--versoin")
    assert (code, out) == (2, "") and "--version" in err and len(err.splitlines()) == 1


def test_init_copies_a_recipe_and_says_what_is_next(here: Path, capsys: Captured) -> None:
    recipe = Path(fedllm.__file__).parent / "recipes" / "own-data.yaml"
    for given, file in ((["own-data"], "own-data.yaml"), (["own-data", "my own.yaml"], "my own.yaml")):
        code, out, err = command(capsys, "init", *given)
        assert (code, err) == (0, "") and (here / file).read_bytes() == recipe.read_bytes()
        (check,) = (line for line in out.splitlines() if "fedllm check" in line)
        words = shlex.split(check.partition(":")[2])
        (here / "my.jsonl").write_text((here / "people.jsonl").read_text())
        assert words == ["fedllm", "check", file] and command(capsys, *words[1:])[0] == 0


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["quikstart"], "there is no packaged recipe 'quikstart'; did you mean 'quickstart'?"),
        (["../recipes/quickstart"], "there is no packaged recipe '../recipes/quickstart'"),
        (["quickstart", "mine.yaml"], "mine.yaml is there already; name another file"),
        (["quickstart", "."], ". is a folder; name a file in it"),
        (["quickstart", "no/such/folder.yaml"], "no/such/folder.yaml cannot be written (No such file or directory)"),
        ([], "missing argument 'recipe'"),
    ],
)
def test_init_refuses(here: Path, capsys: Captured, given: list[str], sentence: str) -> None:
    before = (here / "mine.yaml").read_bytes()
    code, out, err = command(capsys, "init", *given)
    assert (code, out) == (2, "") and sentence in err and len(err.splitlines()) == 1
    assert (here / "mine.yaml").read_bytes() == before and len(list(here.iterdir())) == 2


@pytest.mark.parametrize(
    ("data", "tokens", "expected"),
    [
        ("quickstart", 90, {"chat", "init"}),
        ("people.jsonl", 90, {"chat"}),
        ("people.jsonl", 0, set()),
        ("handbook", 0, {"init"}),
    ],
)
def test_the_last_lines_suit_the_run(data: str, tokens: int, expected: set[str]) -> None:
    steps = next_steps(small(data), {"tokens_trained": tokens}, Path("a run"))
    verbs = [shlex.split(step.partition(":")[2]) for step in steps]
    assert {words[1] for words in verbs} == expected
    assert all(words in (["fedllm", "chat", "a run", "--compare"], ["fedllm", "init", "own-data"]) for words in verbs)
