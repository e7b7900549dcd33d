"""`--seeds`: a run for each, the table by hand, and what happens when one of them fails."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedllm.cli import seeds
from fedllm.errors import RunError
from tests.runs.small import adapter_hash, command

Captured = pytest.CaptureFixture[str]
ONE_ROUND = ("rounds=1", "work.sgd.steps=1", "evaluation.metrics=[nll, perplexity]")


def words(out: str) -> list[str]:
    return [" ".join(line.split()) for line in out.splitlines()]


def test_each_seed_runs_in_its_own_folder_and_the_table_is_theirs(here: Path, capsys: Captured) -> None:
    code, out, err = command(capsys, "run", "mine.yaml", *ONE_ROUND, "--seeds", "3,4", "--out", "both")
    assert (code, err) == (0, "")
    folders = [here / "both" / f"seed-{seed}" for seed in (3, 4)]
    one, two = (json.loads((folder / "summary.json").read_text())["eval"]["federated"]["nll"] for folder in folders)
    assert one != two and adapter_hash(folders[0]) != adapter_hash(folders[1])
    assert "over 2 seeds (3, 4)" in out and "standard deviation over the seeds (n - 1)" in out
    (row,) = (line for line in words(out) if line.startswith("nll ") and "±" in line)
    mean, spread = row.split()[-3], row.split()[-1]
    assert float(mean) == pytest.approx((one + two) / 2, abs=5e-4)
    assert float(spread) == pytest.approx(abs(one - two) / math.sqrt(2), abs=5e-4)
    assert "fedllm report both/seed-3 both/seed-4" in out and "own-data" not in out and "fedllm chat" not in out
    before = {path: path.stat().st_mtime_ns for path in (here / "both").rglob("*")}
    code, again, err = command(capsys, "run", "mine.yaml", *ONE_ROUND, "--seeds", "3,4", "--out", "both")
    assert (code, err) == (0, "") and row in words(again) and "round 1/1" not in again
    assert {path: path.stat().st_mtime_ns for path in (here / "both").rglob("*")} == before


def test_a_seed_that_fails_does_not_lose_the_others(
    here: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def run_file(file: str, overrides: list[str], **given: Any) -> Mapping[str, Any]:
        ran.append(overrides[-1])
        folder = Path("x") / overrides[-1].replace("=", "-")
        assert given == {"engine": "serial", "out": folder, "resume": True, "alone": False}
        if overrides[-1] == "seed=1":
            raise RunError("no room\nfor it")
        if overrides[-1] == "seed=2":
            raise ZeroDivisionError("a bug")
        return {"eval": {"federated": {"nll": 2.0}}}

    monkeypatch.setattr(seeds, "run_file", run_file)
    rest = ("--out", "x", "--engine", "serial", "--resume")
    code, out, err = command(capsys, "run", "mine.yaml", "--seeds", "1,0", *rest)
    assert code == 2 and ran == ["seed=1", "seed=0"]
    assert err == "fedllm: seed 1 failed: no room for it\n"
    assert "over 1 seed (0); failed: 1" in out and "nll 2 ± —" in words(out)
    code, out, err = command(capsys, "run", "mine.yaml", "--seeds", "2,0,1", *rest)
    assert code == 1 and "ZeroDivisionError" in err and "over 1 seed (0); failed: 2, 1" in out


def test_ctrl_c_prints_the_line_for_all_seeds(here: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_file(*_: Any, **__: Any) -> Mapping[str, Any]:
        raise SystemExit(130)

    monkeypatch.setattr(seeds, "run_file", run_file)
    given = ["mine.yaml", "evaluation.metrics=[nll, perplexity]", "--seeds", "0,1", "--out", "two words"]
    code, _, err = command(capsys, "run", *given)
    assert code == 130
    assert shlex.split(err.splitlines()[-1]) == ["fedllm", "run", *given, "--resume"]


def test_an_unfinished_seed_is_refused_before_any_runs(here: Path, capsys: Captured) -> None:
    assert command(capsys, "run", "mine.yaml", *ONE_ROUND, "seed=1", "--out", "x/seed-1")[0] == 0
    (here / "x" / "seed-1" / "summary.json").unlink()
    code, out, err = command(capsys, "run", "mine.yaml", *ONE_ROUND, "--seeds", "0,1", "--out", "x")
    assert code == 2 and "x/seed-1 holds this experiment, unfinished" in err and "--seeds 0,1 --out x --resume" in err
    assert not (here / "x" / "seed-0").exists() and "seed 0" not in out


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--seeds", "1,b"], "--seeds is '1,b'; it must be whole numbers"),
        (["--seeds", ""], "--seeds is ''; it must be whole numbers"),
        (["--seeds", "1,,2"], "--seeds is '1,,2'; it must be whole numbers"),
        (["--seeds", "1,2,1"], "--seeds holds 1 more than once"),
        (["seed=1", "--seeds", "1,2"], "both seed= and --seeds say which seed"),
        (["--seeds", "1,2", "--continue", "runs/x"], "--continue goes on from one run with its one seed"),
        (["work.sgd.lr=-1", "--seeds", "1,2"], "work.sgd.lr is -1.0"),
    ],
)
def test_what_is_refused(here: Path, capsys: Captured, given: list[str], sentence: str) -> None:
    code, _, err = command(capsys, "run", "mine.yaml", *given)
    assert code == 2 and sentence in err and len(err.splitlines()) == 1
    assert not (here / "runs").exists()


def test_the_spread_by_hand(capsys: Captured) -> None:
    """1, 2 and 6: the mean is 3, and the squares (4, 1, 9) over n - 1 = 2 are 7. A seed may lack a figure."""
    found: dict[int, Mapping[str, Any]] = {
        seed: {"eval": {"federated": {"nll": value}, "base": {"nll": 1.5}}}
        for seed, value in ((0, 1.0), (1, 2.0), (2, 6.0))
    }
    found[1]["eval"]["base"]["nll"] = None
    console = Console(width=80)
    seeds.print_spread(found, [0, 1, 2], console)
    lines = words(capsys.readouterr().out)
    assert "metric base federated" in lines and "over 3 seeds (0, 1, 2)" in lines
    assert "nll 1.500 ± 0 (n = 2) 3 ± 2.646" in lines
    seeds.print_spread({}, [0], console)
    assert "nothing was evaluated" in capsys.readouterr().out
