"""The tables of methods: a call that goes on where another stopped, means and deviations by hand, what is refused."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from fedllm.config import load
from tests.test_docs import ROOT

TINY = ["--set", "task.model=tiny-llama", "rounds=1", "work.sgd.steps=1", "evaluation.limit=2"]
TINY += ["work.sgd.max_length=256", "evaluation.max_new_tokens=2"]


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        return importlib.import_module("tables")


@pytest.mark.slow
def test_a_call_goes_on_where_another_stopped(
    tables: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], cache_folder: Path
) -> None:
    words = ["--table", "aggregation", "--out", str(tmp_path / "out"), "--rows", "fedit", "flora", *TINY]
    assert tables.main([*words, "--seeds", "0"]) == 0
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [one["row"] for one in first["rows"]] == ["fedit", "flora"] and first["failed"] == {}
    assert first["rows"][1]["mib_up"] > first["rows"][0]["mib_up"] > 0 and first["rows"][0]["trainable"] == 19456
    assert tables.main([*words, "--seeds", "0", "1"]) == 0
    second = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert second["rows"][:2] == first["rows"] and [one["seed"] for one in second["rows"]] == [0, 0, 1, 1]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["aggregation.jsonl"], "run folders are gone"


@pytest.mark.slow
def test_data_of_ones_own(tables: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"Question {n}?", "response": f"{n}", "topic": f"t{n % 3}"} for n in range(60)]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = ["--table", "aggregation", "--out", str(tmp_path / "out"), "--rows", "fedit", "--seeds", "0"]
    words += ["--data", str(tmp_path / "my.jsonl"), "--clients", "3", *TINY]
    assert tables.main([*words, "--by", "topic"]) == 0, capsys.readouterr().err
    assert tables.main([*words, "--by", "topik", "--out", str(tmp_path / "other")]) == 1
    assert "fedit: left out: " in capsys.readouterr().err


def test_the_table_by_hand(tables: ModuleType) -> None:
    found = [
        {"row": "fedit", "seed": seed, "nll": nll, "bias": None, "mib_up": 1.0} for seed, nll in enumerate((1.0, 2.0))
    ]
    found.append({"row": "flora", "seed": 0, "nll": 1.23456, "bias": 0.0, "seconds": 12.3})
    text = tables.markdown(tables.TABLES["aggregation"], found).splitlines()
    assert text[0] == "| method | nll | exact_match | bias | mib_up | mib_down | seconds |"
    assert text[2:] == ["| fedit | 1.500 ± 0.707 | - | - | 1.0 | - | - |", "| flora | 1.235 | - | 0.000 | - | - | 12 |"]


@pytest.mark.parametrize("table", ["aggregation", "ranks", "tuning"])
def test_every_row_is_an_experiment(tables: ModuleType, table: str) -> None:
    made = tables.TABLES[table]
    found = [load(made.recipe, settings) for settings in made.rows.values()]
    assert len({repr(experiment) for experiment in found}) == len(found)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--table", "aggregation", "--out", "x", "--rows", "flroa"], "there is no row 'flroa'; did you mean 'flora'?"),
        (["--table", "none", "--out", "x"], "invalid choice: 'none'"),
        (["--table", "ranks"], "required: --out"),
    ],
)
def test_what_is_wrong_is_said(
    tables: ModuleType, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parse: Callable[[list[str]], argparse.Namespace] = tables.parsed
    with pytest.raises(SystemExit) as caught:
        parse(words)
    assert caught.value.code == 2 and sentence in capsys.readouterr().err
