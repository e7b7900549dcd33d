"""The tables of methods: a call that goes on where another stopped, means and deviations by hand, what is refused."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from fedllm.experiment.config_file import load
from tests.test_docs import ROOT

TINY = ["--set", "task.model=tiny-llama", "rounds=1", "work.sgd.steps=1", "evaluation.limit=2"]
TINY += ["work.sgd.max_length=256", "evaluation.max_new_tokens=2"]


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        return importlib.import_module("tables")


@pytest.fixture(scope="module")
def intents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records in the form of Banking77."""
    path = tmp_path_factory.mktemp("intents") / "my.jsonl"
    rows = [{"text": f"Question {n}?", "category": f"intent_{n % 7}"} for n in range(400)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


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
def test_partitions_of_data_of_ones_own(
    tables: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], intents: Path
) -> None:
    words = ["--table", "skew", "--out", str(tmp_path / "out"), "--rows", "fedit", "--seeds", "0", *TINY]
    words += ["federation.shards.clients=3", "--data", str(intents)]
    assert tables.main(words) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[:2] for line in printed[2:5]] == [["| fedit", name] for name in tables.PARTITIONS]
    found = json.loads(printed[-1])["rows"]
    assert len({one["nll"] for one in found}) == 3 and len({one["mib_up"] for one in found}) == 1
    assert tables.main([*words[:-1], "nothing.jsonl", "--out", str(tmp_path / "other")]) == 1
    assert "fedit: left out: " in capsys.readouterr().err


@pytest.mark.slow
def test_ten_clients_of_their_ranks(
    tables: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], intents: Path
) -> None:
    words = ["--table", "ten-ranks", "--out", str(tmp_path / "out"), "--rows", "zero_padding", "--seeds", "0"]
    words += ["--data", str(intents), *TINY, "federation.shards.partition=iid"]
    words += [f"federation.shards.profiles.client-{number:03}.rank={16 - number}" for number in range(10)]
    assert tables.main([*words, "task.adapter.lora.rank=16"]) == 0, capsys.readouterr().err
    (found,) = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert found["bias"] > 0 and found["mib_up"] == pytest.approx(found["mib_down"], rel=0.3)


def test_the_table_by_hand(tables: ModuleType) -> None:
    found = [
        {"row": "fedit", "seed": seed, "nll": nll, "bias": None, "mib_up": 1.0} for seed, nll in enumerate((1.0, 2.0))
    ]
    found.append({"row": "flora", "seed": 0, "nll": 1.23456, "bias": 0.0, "seconds": 12.3})
    text = tables.markdown(tables.TABLES["aggregation"], found).splitlines()
    assert text[0] == "| method | nll | exact_match | bias | mib_up | mib_down | seconds |"
    assert text[2:] == ["| fedit | 1.500 ± 0.707 | - | - | 1.0 | - | - |", "| flora | 1.235 | - | 0.000 | - | - | 12 |"]


@pytest.mark.parametrize("table", ["aggregation", "ranks", "tuning", "skew", "ten-ranks"])
def test_every_row_is_an_experiment(tables: ModuleType, table: str) -> None:
    made = tables.TABLES[table]
    pairs = [(row, partition) for row in made.rows.values() for partition in made.partitions.values()]
    assert len({repr(load(made.recipe, [*row, *partition])) for row, partition in pairs}) == len(pairs)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--table", "aggregation", "--out", "x", "--rows", "flroa"], "there is no row 'flroa'; did you mean 'flora'?"),
        (["--table", "none", "--out", "x"], "invalid choice: 'none'"),
        (["--table", "ranks"], "required: --out"),
        (["--table", "skew", "--out", "x"], "--table skew takes --data FILE, such as Banking77's train.jsonl.gz"),
    ],
)
def test_what_is_wrong_is_said(
    tables: ModuleType, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parse: Callable[[list[str]], argparse.Namespace] = tables.parsed
    with pytest.raises(SystemExit) as caught:
        parse(words)
    assert caught.value.code == 2 and sentence in capsys.readouterr().err
