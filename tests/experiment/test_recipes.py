"""Every packaged recipe runs: shortened on the tiny model, and the quickstart whole on the real one."""

from __future__ import annotations

import gzip
import json
import re
import shlex
from pathlib import Path

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant

import fedllm
from fedllm.experiment import config_file
from fedllm.experiment.checks.check import check
from fedllm.report import write_report

RECIPES = sorted((Path(fedllm.__file__).parent / "recipes").glob("*.yaml"))
assert RECIPES, "the recipes have moved"
SHORT = [
    "task.model=tiny-llama",
    "rounds=1",
    "work.sgd.steps=1",
    "work.sgd.max_length=256",
    "evaluation.limit=2",
    "evaluation.max_new_tokens=2",
]


@pytest.fixture(autouse=True)
def own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": f"Question {n}?", "response": f"answer {n}"} for n in range(40)]
    (tmp_path / "my.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    lines = [f"Question {n}?,answer {n}" for n in range(40)]
    (tmp_path / "my.csv").write_text("\n".join(["question,response", *lines]) + "\n", encoding="utf-8")
    intents = [{"text": f"Question {n}?", "category": f"intent {n % 40}"} for n in range(2000)]
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, intents)).encode()))
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [path.stem for path in RECIPES])
def test_recipe_runs(recipe: str, cache_folder: Path) -> None:
    experiment = config_file.load(recipe, SHORT)
    result = fedllm.run(experiment, out="run")
    assert result.summary["rounds"] == 1 and result.summary["bytes_up"] > 0
    assert (result.folder / "adapter" / "adapter_model.safetensors").is_file()
    for which in experiment.evaluation.compare:
        assert result.summary["eval"][which], which


@pytest.mark.slow
def test_the_private_handbook_says_what_it_spent(cache_folder: Path) -> None:
    """Its epsilon, computed again from `privacy.json` alone by another library, and the curve in its report."""
    result = fedllm.run(config_file.load("handbook-dp", [*SHORT, "rounds=3"]), out="run")
    write_report([result.folder], result.folder / "report.html")
    said = json.loads((result.folder / "privacy.json").read_text("utf-8"))
    accountant = PLDAccountant()
    for entry in said["ledger"]:
        noise = dp_accounting.GaussianDpEvent(entry["noise_multiplier"])
        accountant.compose(dp_accounting.PoissonSampledDpEvent(entry["scheme"]["rate"], noise), entry["count"])
    assert accountant.get_epsilon(said["delta"]) == pytest.approx(said["epsilon"], abs=0.02)
    assert 7.9 < said["epsilon"] <= 8 and result.summary["epsilon"] == said["epsilon"]
    assert "Epsilon, by round" in (result.folder / "report.html").read_text("utf-8")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_commands_in_a_recipe_are_right(path: Path) -> None:
    commands = re.findall(r"^#\s+fedllm run (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert commands, "a recipe says how it is run"
    for command in commands:
        words = shlex.split(command)
        words = words[: words.index("--out")] if "--out" in words else words
        assert words[0] == path.stem
        check(config_file.load(words[0], words[1:]))


@pytest.mark.model
def test_the_quickstart_teaches_what_it_claims(smollm2: str, tmp_path: Path) -> None:
    """Over the private facts of all four organisations, in other words than they were taught in."""
    scores = fedllm.run(config_file.load("quickstart"), out=tmp_path / "run").summary["eval"]
    private = {which: scores[which]["exact_match/private"] for which in ("base", "local_only", "federated")}
    assert private["base"] <= 0.05
    assert private["federated"] >= 0.5
    assert private["federated"] >= 2 * private["local_only"]
    assert private["local_only"] <= 0.25 + 0.05  # what one organisation alone can know
    assert scores["local_only"]["own/exact_match/private"] >= 0.5  # it was trained well enough to be held against
