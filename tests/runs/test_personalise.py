"""A newcomer's own model: the personal part trains, the shared one stays, and every verb finds it by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fedllm
from fedllm.data.heldout import hold_out
from fedllm.data.records import read_records
from fedllm.engines.serial import Serial
from fedllm.messages.context import RoundContext
from fedllm.models.batch import collate
from fedllm.runs.loaded_run import open_run
from fedllm.runs.personal_files import own_part
from fedllm.runs.personalise import Newcomer, personalise
from fedllm.training.base import ClientJob
from tests.runs.small import adapter_hash, command, small

STEPS, LR = 5, 0.1


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dora") / "dora.jsonl"
    rows = [{"q": f"dora {place}?", "a": f"arod{place * 7}"} for place in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def run(data: Path, session_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDLLM_CACHE", str(session_cache))
        out = tmp_path_factory.mktemp("personal") / "run"
        experiment = small(data, rounds=2, task__scope={"share": ["*lora_A"]}, evaluation__limit=None)
        return fedllm.run(experiment, engine=Serial(), out=out).folder


@pytest.fixture(scope="module")
def dora(run: Path, records: Path) -> tuple[str, Path]:
    """The hash of the run's adapters before, and where the newcomer's is."""
    before = adapter_hash(run)
    fields = {"prompt": "q", "response": "a"}
    made = personalise(run, Newcomer("dora", str(records), fields, steps=STEPS, lr=LR, heldout=0.2))
    assert (made.tensors, made.trained, made.heldout) == (4, 8, 2)
    assert made.after["nll"] < made.before["nll"]
    return before, made.folder


def test_the_shared_part_stays_to_the_bit(run: Path, dora: tuple[str, Path]) -> None:
    before, folder = dora
    everyone = load_file(run / "adapter" / "adapter_model.safetensors")
    own = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert own.keys() == everyone.keys()
    for name, leaf in everyone.items():
        assert torch.equal(leaf, own[name]) == ("lora_A" in name)
    (folder / "adapter" / "adapter_model.safetensors").rename(folder / "aside")
    assert adapter_hash(run) == before, "of the run and of its clients"
    (folder / "aside").rename(folder / "adapter" / "adapter_model.safetensors")


def test_the_personal_part_is_that_of_a_textbook_loop(run: Path, records: Path, dora: tuple[str, Path]) -> None:
    """B <- B - lr dL/dB from B = 0, with A as the server has it, on the newcomer's batches."""
    opened = open_run(run)
    model, work, key = opened.model, opened.experiment.work, opened.experiment.key
    rows = read_records(str(records), fields={"prompt": "q", "response": "a"})
    train, _ = hold_out(rows, fraction=0.2, key=key.fold("heldout", "dora"))
    examples = [example for row in train if (example := model.encode(row, work.max_length)) is not None]
    job = ClientJob(RoundContext(0, key, 1, 1, client="dora"), {}, examples)
    shared = {name: leaf[None] for name, leaf in opened.params.items() if "lora_A" in name}
    b = {name: torch.zeros_like(leaf) for name, leaf in opened.params.items() if "lora_B" in name}
    for micro in replace(work, steps=STEPS).plan(len(examples), job.ctx):
        leaves = {name: leaf[None].clone().requires_grad_() for name, leaf in b.items()}
        (loss,) = model.losses({**shared, **leaves}, collate([[examples[index] for index in micro[0]]]))
        grads = torch.autograd.grad(loss, list(leaves.values()))
        b = {name: leaf - LR * grad[0] for (name, leaf), grad in zip(b.items(), grads, strict=True)}
    found = own_part(opened.folder, "dora")
    assert found.keys() == b.keys()
    for name, leaf in b.items():
        assert leaf.any()
        torch.testing.assert_close(found[name], leaf, rtol=1e-4, atol=1e-6)


def test_every_verb_finds_it(run: Path, dora: tuple[str, Path], tmp_path: Path, capsys: Any) -> None:
    code, told, _ = command(capsys, "eval", run, "--client", "dora")
    assert code == 0 and [line.split()[0] for line in told.splitlines()[1:]] == ["its", "others", "all"]
    scores = json.loads((run / "eval-dora.json").read_text())["scores"]
    after = json.loads((dora[1] / "personal.json").read_text())["after"]
    assert scores["its own"]["nll"] == pytest.approx(after["nll"])
    assert min(scores["its own"]["nll"], scores["others"]["nll"]) <= scores["all"]["nll"]
    code, said, _ = command(capsys, "chat", run, "--client", "dora", "--prompt", "dora 3?", "--max-new-tokens", "3")
    assert code == 0 and said
    code, _, _ = command(capsys, "export", run, "--client", "dora", "--to", "peft", "--out", tmp_path / "peft")
    exported = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert code == 0
    for name, leaf in load_file(dora[1] / "adapter" / "adapter_model.safetensors").items():
        assert torch.equal(leaf, exported[name])


def test_a_client_of_the_run_is_scored_alone(run: Path, capsys: Any) -> None:
    assert command(capsys, "eval", run)[0] == 0 and command(capsys, "eval", run, "--client", "ben")[0] == 0
    everyone = json.loads((run / "eval.json").read_text())["scores"]
    ben = json.loads((run / "eval-ben.json").read_text())["scores"]
    assert ben["its own"]["nll"] == pytest.approx(everyone["ben"]["nll"], rel=1e-6)
    assert ben["others"]["nll"] != pytest.approx(everyone["all"]["nll"]), "of its model alone"


def test_without_training_a_newcomer_has_the_shared_part(run: Path) -> None:
    opened = open_run(run)
    fresh = opened.params_of("nobody yet")
    assert fresh.keys() == opened.params.keys()
    assert all(torch.equal(leaf, opened.params[name]) for name, leaf in fresh.items())
    assert all(not leaf.any() for name, leaf in fresh.items() if "lora_B" in name)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval", "RUN", "--client", "bem"], "no personal model of 'bem'; did you mean 'ben'"),
        (["chat", "RUN", "--client", "dorra", "--prompt", "x"], "no personal model of 'dorra'; did you mean 'dora'"),
        (["personalise", "RUN", "--data", "DORA", "--name", "ben"], "'ben' is a client of"),
        (["personalise", "RUN", "--data", "DORA", "--name", "dora"], "is there already; choose another --name"),
        (["personalise", "RUN", "--data", "DORA", "--name", "eve"], "holds q, a; name in `fields` which"),
        (["personalise", "RUN", "--data", "DORA", "--name", "eve", "--fields", "prompt=qq"], "no field 'qq'"),
        (["personalise", "RUN", "--data", "DORA", "--name", "eve", "--fields", "promt=q"], "did you mean 'prompt'"),
        (["personalise", "RUN", "--data", "DORA", "--name", "eve", "--fields", "q"], "is not NAME=FIELD"),
        (["personalise", "RUN", "--data", "EMPTY", "--name", "eve"], "holds no records"),
        (["personalise", "RUN", "--data", "DORA", "--name", "a/b"], "cannot name a folder"),
        (["personalise", "RUN", "--data", "DORA", "--name", "eve", "--heldout", "1.5"], "must be 0 or more and"),
        (["personalise", "PLAIN", "--data", "DORA", "--name", "eve"], "has no personal part to train: its method"),
        (["eval", "PLAIN", "--client", "ben"], "no client of this run has parameters of its own"),
    ],
)
def test_bad_input_is_one_sentence(
    words: list[str], message: str, run: Path, dora: tuple[str, Path], records: Path, finished: fedllm.Result,
    tmp_path: Path, capsys: Any,
) -> None:  # fmt: skip
    (tmp_path / "empty.jsonl").write_text("")
    places = {"RUN": run, "PLAIN": finished.folder, "DORA": records, "EMPTY": tmp_path / "empty.jsonl"}
    code, _, told = command(capsys, *(places.get(word, word) for word in words))
    assert code == 2 and message in told and told.count("\n") == 1
    assert not (run / "clients" / "eve").exists()


def test_records_that_changed_since_are_not_scored(
    run: Path, dora: tuple[str, Path], records: Path, capsys: Any
) -> None:
    whole = records.read_text()
    records.write_text(whole + json.dumps({"q": "new?", "a": "yes"}) + "\n")
    code, _, told = command(capsys, "eval", run, "--client", "dora")
    records.write_text(whole)
    assert code == 2 and "has changed since dora was made from it" in told
