"""What a user gets wrong is one clear sentence and exit code 2, and nothing is half-written."""

from __future__ import annotations

import errno
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

import fedllm
from fedllm.cli.display import Display
from fedllm.engines.registry import ENGINES
from fedllm.errors import FedllmError, RunError
from fedllm.events import ClientFailed, DataReported, RoundFinished, Warned
from fedllm.messages.context import ClientContext
from fedllm.runs import checkpoints
from fedllm.runs.checkpoints import Checkpoints
from fedllm.stages.base import Stage
from fedllm.tensors.tree import Tree, equal, finite
from tests.runs.small import Stop, StopAt, adapter_hash, command, events, small, spec


@pytest.fixture
def here(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to stand in, but for `mine.yaml`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(spec(data)), encoding="utf-8")
    return tmp_path


def refused(capsys: Any, *words: str | Path) -> str:
    """The one sentence."""
    code, out, err = command(capsys, *words)
    assert code == 2, (out, err)
    assert out == ""
    assert err.startswith("fedllm: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert "Traceback" not in err
    assert len(err) < 400, "one sentence"
    return err


SETTINGS = [
    ("roundz=3", ["roundz", "did you mean 'rounds'"]),
    ("work.sgd.learning_rate=3", ["work.sgd.learning_rate", "did you mean 'lr'"]),
    ("limits.quorum=4", ["limits.quorum is 4", "a round asks 3 of 3 clients"]),
    ("work.sgd.step=3", ["work.sgd.step", "did you mean 'steps'"]),
    ("task.adapter.lora.rnk=3", ["task.adapter.lora.rnk", "did you mean 'rank'"]),
    ("stages=[by_example]", ["unknown stage 'by_example'", "did you mean 'by_examples'"]),
    ("stages=[proxx, by_examples]", ["unknown stage 'proxx'", "did you mean 'prox'"]),
    ("aggregator=summ", ["unknown aggregator 'summ'", "did you mean 'sum'"]),
    ("work=sgdd", ["unknown work 'sgdd'", "did you mean 'sgd'"]),
    ("task.adapter=lorra", ["'lorra'", "did you mean 'lora'"]),
    ("task.objective=sfft", ["'sfft'", "did you mean 'sft'"]),
    ("federation.shards.partition=dirichlett", ["'dirichlett'", "did you mean 'dirichlet'"]),
    ("federation.shards.sampling=poison", ["'poison'", "did you mean 'poisson'"]),
    ("task.model=tiny-lama", ["tiny-lama", "tiny-llama"]),
    ("evaluation.metrics=[exact_mach]", ["unknown metric 'exact_mach'", "did you mean 'exact_match'"]),
    ("task.template=chatt", ["task.template", "chatt", "chat"]),
    ("work.sgd.optimizer=sdg", ["work.sgd.optimizer", "sdg", "sgd"]),
    ("task.dtype=float33", ["task.dtype", "float33"]),
    ("task.device=cudaa", ["cudaa"]),
    ("rounds=three", ["rounds", "three"]),
    ("rounds=2.5", ["rounds", "2.5"]),
    ("work.sgd.lr=fast", ["work.sgd.lr", "fast"]),
    ("work.sgd=5.0", ["work.sgd"]),
    ("evaluation.metrics=7", ["evaluation.metrics"]),
    ("task=7", ["task"]),
    ("stages=7", ["stages"]),
    ("rounds=-1", ["rounds is -1"]),
    ("work.sgd.lr=-0.1", ["work.sgd.lr is -0.1"]),
    ("work.sgd.lr=.nan", ["work.sgd.lr"]),
    ("work.sgd.steps=-1", ["work.sgd.steps"]),
    ("work.sgd.batch_size=0", ["work.sgd.batch_size is 0"]),
    ("work.sgd.max_length=0", ["work.sgd.max_length is 0"]),
    ("evaluation.every=0", ["evaluation.every is 0"]),
    ("evaluation.limit=-1", ["evaluation.limit is -1"]),
    ("evaluation.batch_size=0", ["evaluation.batch_size is 0"]),
    ("evaluation.max_new_tokens=-5", ["evaluation.max_new_tokens is -5"]),
    ("limits.bytes=-5", ["limits.bytes is -5"]),
    ("limits.quorum=0", ["limits.quorum is 0"]),
    ("task.adapter.lora.rank=0", ["task.adapter.lora.rank is 0"]),
    ("task.adapter.lora.rank=500", ["rank is 500", "above the size"]),
    ("task.adapter.lora.targets=[q_prj]", ["q_prj", "did you mean 'q_proj'"]),
    ("task.scope.train=[nothing]", ["task.scope"]),
    ("federation.shards.heldout=1.5", ["federation.shards.heldout is 1.5"]),
    ("federation.shards.failure_rate=2.0", ["federation.shards.failure_rate is 2.0"]),
    ("federation.shards.clients=0", ["federation.shards.clients is 0"]),
    ("federation.shards={clients: 12, partition: iid, data: DATA}", ["11 records for 12 clients"]),
    ("federation.shards={clients: 3, sampling: {uniform: {cohort: 4}}, data: DATA}", ["cohort is 4", "3 clients"]),
    ("federation.shards.failures=[{client: bem, round: 0}]", ["'bem'", "did you mean 'ben'"]),
    ("federation.shards.partition.by=whom", ["whom", "did you mean 'who'"]),
    ("federation.shards.data=peeple.jsonl", ["peeple.jsonl"]),
    ("federation.shards.data=missing/x.jsonl", ["missing"]),
    ("federation.shards.fields.prompt=question", ["people.jsonl:1", "question"]),
    ("evaluation.by=kind", ["evaluation.by", "kind"]),
    ("evaluation.best=rouge_l", ["evaluation.best is rouge_l"]),
    ("work.sgd.max_length=6", ["no record of ann", "max_length"]),
    ("stages=[]", ["weigh"]),
    ("stages=[{quantize: 4}, by_examples]", ["quantize", "by_examples"]),
    ("nothing", ["nothing", "dotted.key=value"]),
    ("task.adapter={lora: {rank: 2}", ["YAML"]),
]


@pytest.mark.parametrize(("setting", "words"), SETTINGS, ids=[setting for setting, _ in SETTINGS])
def test_a_wrong_setting_is_one_sentence(
    here: Path, data: Path, capsys: pytest.CaptureFixture[str], setting: str, words: list[str]
) -> None:
    text = refused(capsys, "run", "mine.yaml", setting.replace("DATA", str(data)))
    for word in words:
        assert word in text
    assert [path.name for path in here.iterdir() if path.name != "runs"] == ["mine.yaml"]
    assert not list(here.glob("runs/*")), "no run folder is left behind"


def test_records_that_do_not_suit_a_metric_leave_no_folder(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = command(capsys, "run", "mine.yaml", "evaluation.metrics=[accuracy]")
    assert code == 2
    assert "accuracy" in err and "choices" in err and err.count("\n") == 1
    assert not list(here.glob("runs/*"))


FILES = [
    ("task: {model: tiny-llama\nrounds: 3", ["bad.yaml", "line"]),
    ("rounds: 3\nrounds: 4\n", ["bad.yaml", "'rounds'", "twice"]),
    ("- a\n- b\n", ["bad.yaml", "mapping"]),
    ("", ["bad.yaml", "mapping"]),
    ("rounds: 3\n", ["bad.yaml", "method"]),
    ("method: fedivg\n", ["unknown method 'fedivg'", "did you mean 'fedavg'"]),
    ("method: {fedprox: {nu: 3}}\n", ["fedprox", "'nu'", "mu"]),
    ("method: fedavg\nstages: [uniform]\n", ["method fedavg", "uniform"]),
    ("method: fedavg\n", ["'task' is missing"]),
    ("method: fedavg\ntask: !!python/object/apply:os.system [echo]\n", ["bad.yaml"]),
    ("a: &a [*a]\n", ["bad.yaml"]),
]


@pytest.mark.parametrize(("text", "words"), FILES, ids=[text[:20] for text, _ in FILES])
@pytest.mark.parametrize("verb", ["run", "check"])
def test_a_wrong_file_is_one_sentence(
    here: Path, capsys: pytest.CaptureFixture[str], verb: str, text: str, words: list[str]
) -> None:
    (here / "bad.yaml").write_text(text, encoding="utf-8")
    told = refused(capsys, verb, "bad.yaml")
    for word in words:
        assert word in told
    assert not (here / "runs").exists()


GREETING = [{"role": "assistant", "content": "Hello!"}]
CALLING = [
    {"role": "user", "content": "Rain?"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather"}}]},
]


def test_a_record_is_named_by_file_and_line(here: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = data.read_text(encoding="utf-8").splitlines()
    for bad, words in [
        ('{"prompt": "x", "who": "ann"}', ["own.jsonl:3", "response"]),
        ('{"prompt": "x", "response": 5, "who": "ann"}', ["own.jsonl:3", "'response'"]),
        ("{'prompt'}", ["own.jsonl:3", "JSON"]),
        ("[]", ["own.jsonl:3"]),
        (json.dumps({"messages": GREETING, "who": "ann"}), ["own.jsonl:3", "begins with a turn of the role"]),
        (json.dumps({"messages": CALLING, "who": "ann"}), ["own.jsonl:3", "leaves out the calls of tools"]),
    ]:
        (here / "own.jsonl").write_text("\n".join([*lines[:2], bad, *lines[2:]]), encoding="utf-8")
        told = refused(capsys, "run", "mine.yaml", "federation.shards.data=own.jsonl")
        assert all(word in told for word in words), told
    (here / "own.jsonl").write_text("")
    assert "no records" in refused(capsys, "check", "mine.yaml", "federation.shards.data=own.jsonl")


def test_held_out_records_are_named_and_counted_as_those_to_train_on(
    here: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = data.read_text(encoding="utf-8").splitlines()
    held = here / "held.jsonl"
    held.write_text("\n".join([*lines, json.dumps({"messages": CALLING, "who": "cid"})]), encoding="utf-8")
    told = refused(capsys, "run", "mine.yaml", "federation.shards.heldout=held.jsonl", "evaluation.limit=3")
    assert f"held.jsonl:{len(lines) + 1}: the model's chat template leaves out the calls of tools" in told
    held.write_text(data.read_text(encoding="utf-8").replace("ann 1?", f"{'long ' * 9}?"))
    result = fedllm.run(small(data, federation__shards__heldout=str(held), rounds=0), out=here / "run")
    (report,) = (event for event in events(result.folder) if isinstance(event, DataReported))
    assert (report.cut, report.dropped, report.heldout_cut, report.heldout_dropped) == (0, 0, 0, 1)
    (warned,) = (event for event in events(result.folder) if isinstance(event, Warned))
    assert warned.text.startswith("1 held-out records keep no target token in 48 tokens")


def test_names_that_do_not_exist(here: Path, finished: fedllm.Result, capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'mine.yaml'" in refused(capsys, "run", "mune.yaml")
    assert "did you mean 'quickstart'" in refused(capsys, "check", "quickstrt")
    assert "did you mean 'serial'" in refused(capsys, "run", "mine.yaml", "--engine", "seriall")
    assert "did you mean 'methods'" in refused(capsys, "ls", "method")
    assert "did you mean 'merged'" in refused(capsys, "export", finished.folder, "--to", "merge")
    resolved = finished.folder / "experiment.yaml"
    assert "did you mean 'batched'" in refused(capsys, "run", resolved, "--engine", "batchd", "--out", finished.folder)
    for verb in ("eval", "chat", "report"):
        assert "nowhere" in refused(capsys, verb, "nowhere")
    assert "nowhere" in refused(capsys, "export", "nowhere", "--to", "peft")
    assert "no personal model of 'x'" in refused(capsys, "chat", finished.folder, "--client", "x", "--prompt", "hi")
    assert [path.name for path in here.iterdir()] == ["mine.yaml"]


def test_a_prompt_of_bytes_that_are_no_text_is_answered(
    finished: fedllm.Result, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = command(capsys, "chat", finished.folder, "--prompt", "hi \udcff", "--max-new-tokens", "1")
    assert (code, err) == (0, "") and out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["runn"], "did you mean 'run'"),
        (["run"], "missing argument 'file'"),
        (["run", "mine.yaml", "--engin", "serial"], "--engine"),
        (["run", "mine.yaml", "--engine"], "--engine"),
        (["--verbose"], "no such option: --verbose"),
        (["export", "x"], "missing option '--to'"),
        (["chat", "x", "--max-new-tokens", "many"], "valid integer"),
        (["chat", "x", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["ls"], "missing argument 'what'"),
        (["ls", "methods", "models"], "models"),
        (["report"], "missing argument 'folders'"),
    ],
)
def test_a_wrong_line_is_one_sentence(
    here: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    text = refused(capsys, *words)
    assert told in text
    assert "--help" in text, "where to look"


def test_verbs_and_engines_that_are_not_there_are_not_listed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = command(capsys, "run", "--help")
    assert (code, err) == (0, "")
    for engine in ("serial", "batched", "ray", "flare", "flower"):
        assert (engine in out) == (engine in ENGINES)
    code, out, _ = command(capsys, "--help")
    verbs = {line.split()[0] for line in out.partition("Commands:")[2].splitlines() if line.strip()}
    assert {"run", "check", "ls", "eval", "chat", "export", "report"} <= verbs
    for verb in {"audit", "server", "client", "status", "stop", "keys", "console"} - verbs:
        assert f"no such command '{verb}'" in refused(capsys, verb)


def test_folders_on_the_command_line(here: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "full").mkdir()
    (here / "full" / "letter.txt").write_text("mine")
    assert "other files" in refused(capsys, "run", "mine.yaml", "--out", "full")
    assert "is a file" in refused(capsys, "run", "mine.yaml", "--out", "mine.yaml")
    assert "mine.yaml" in refused(capsys, "run", "mine.yaml", "--out", "mine.yaml/below")
    with pytest.raises(Stop):
        fedllm.run(small(data), out=here / "half", listeners=[StopAt(lambda e: isinstance(e, RoundFinished))])
    told = refused(capsys, "run", "mine.yaml", "--out", "half", "evaluation.metrics=[nll, perplexity]")
    assert "another experiment" in told and "evaluation.metrics" in told
    told = refused(capsys, "run", "mine.yaml", "--out", "half", "evaluation.every=1", "--engine", "serial")
    assert told.strip().endswith(
        "go on with: fedllm run mine.yaml evaluation.every=1 --engine serial --out half --resume"
    )


def test_a_missing_package_comes_with_its_install_line(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "own.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    told = refused(capsys, "run", "mine.yaml", "federation.shards.data=own.parquet")
    assert "pyarrow is not installed; install it with: pip install 'fedllm[data]'" in told


def test_a_full_disk_is_one_sentence_and_can_be_resumed(
    here: Path, finished: fedllm.Result, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoints.write_durably

    def full(path: Path, content: bytes) -> None:
        if "round-000002" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_durably", full)
        code, _, err = command(capsys, "run", "mine.yaml", "--out", "run")
    assert code == 2
    assert err.startswith("fedllm: ") and "No space left on device" in err and "Traceback" not in err
    code, _, err = command(capsys, "run", "mine.yaml", "--out", "run", "--resume")
    assert code == 0, err
    assert adapter_hash(here / "run") == adapter_hash(finished.folder)


def test_what_nobody_expected_keeps_its_traceback(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a fault of the program")

    monkeypatch.setattr("fedllm.cli.check.check_file", broken)
    monkeypatch.setattr("sys.argv", ["fedllm", "check", "mine.yaml"])
    from fedllm.cli.main import main

    with pytest.raises(ZeroDivisionError):
        main()


@dataclass(frozen=True)
class Poison(Stage):
    """One client's gradients are no numbers from its first step in one round."""

    client: str
    round: int

    def receive(self, params: Tree, extra: Tree, memory: Tree, local: ClientContext) -> tuple[Tree, Tree]:
        meant = (local.ctx.client, local.ctx.round) == (self.client, self.round)
        return params, {"factor": torch.tensor(float("nan") if meant else 1.0)}

    def grads(self, grads: Tree, params: Tree, scratch: Tree) -> Tree:
        return {name: leaf * scratch["factor"] for name, leaf in grads.items()}


def test_a_loss_that_is_no_number_costs_one_client_one_round(data: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    experiment = small(data, rounds=3)
    experiment = replace(experiment, stages=(Poison("ben", 1), *experiment.stages))
    screen = io.StringIO()
    with Display(Console(file=screen, width=200)) as display:
        result = fedllm.run(experiment, out=tmp_path / "run", listeners=[display])
    log = events(tmp_path / "run")
    (failed,) = (event for event in log if isinstance(event, ClientFailed))
    assert (failed.client, failed.round) == ("ben", 1)
    assert "at step 1 its loss is nan" in failed.reason and "lower work.sgd.lr" in failed.reason
    assert [event.clients for event in log if isinstance(event, RoundFinished)] == [3, 2, 3]
    assert finite(result.params)
    (line,) = (line for line in screen.getvalue().splitlines() if "lost" in line)
    assert line.startswith("round 2: lost ben: at step 1 its loss is nan"), "rounds are shown from 1"


def test_a_run_in_which_every_loss_explodes_ends_where_it_began(data: Path, tmp_path: Path) -> None:
    experiment = small(data, work__sgd__lr=1e300, rounds=2)
    with pytest.raises(RunError, match=r"no round of 2 had an answer.*ann was lost: at step 1 its loss is nan"):
        fedllm.run(experiment, out=tmp_path / "run")
    ended = Checkpoints(tmp_path / "run" / "checkpoints", 2).load()
    assert ended is not None
    assert equal(ended.params, fedllm.run(small(data, rounds=0), out=tmp_path / "start").params)
    notes = [event.note for event in events(tmp_path / "run") if isinstance(event, RoundFinished)]
    assert notes == ["0 of 3 answered: an empty round"] * 2


def test_a_comparison_that_fails_does_not_take_the_run_with_it(data: Path, tmp_path: Path) -> None:
    experiment = small(data, rounds=1, evaluation__compare=["local_only"], evaluation__compare_lr=[1e300])
    result = fedllm.run(experiment, out=tmp_path / "run")
    assert result.summary["eval"]["federated"] is not None
    assert result.summary["eval"]["local_only"] is None
    assert "local_only has no figures" in json.dumps([vars(event) for event in events(tmp_path / "run")], default=str)


def test_python_callers_get_the_same_sentences(data: Path, tmp_path: Path) -> None:
    for changes in ({"evaluation__metrics": ["nlll"]}, {"work__sgd__max_length": 6}):
        with pytest.raises(FedllmError):
            fedllm.run(small(data, **changes), out=tmp_path / "run")
    with pytest.raises(FedllmError, match="unknown engine 'serail'; did you mean 'serial'"):
        fedllm.run(small(data), out=tmp_path / "run", engine="serail")
    assert not (tmp_path / "run").exists()
