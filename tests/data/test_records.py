"""Reading records: every kind of source, the mapping of fields, and errors that name the file and the line."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedllm.data.records import read_records
from fedllm.errors import ConfigError, DataError, MissingExtra

TWO = [{"prompt": "a", "response": "b"}, {"prompt": "c\nd", "response": 'é, "x"', "extra": "7"}]


def lines(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.jsonl.gz", "t.JSON.GZ"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    text = "\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in TWO)
    data = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data, mtime=0) if name.lower().endswith("gz") else data)
    assert read_records(str(tmp_path / name)) == TWO


def test_json_array(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps(TWO, indent=2))
    assert read_records(str(tmp_path / "t.json")) == TWO


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz"])
def test_csv(tmp_path: Path, name: str) -> None:
    data = 'prompt,response,n\r\na,b,1\r\n"c\nd","é, ""x""",2\r\n'.encode()
    (tmp_path / name).write_bytes(gzip.compress(data, mtime=0) if name.endswith("gz") else data)
    records = read_records(str(tmp_path / name))
    assert records == [{"prompt": "a", "response": "b", "n": "1"}, {"prompt": "c\nd", "response": 'é, "x"', "n": "2"}]


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"prompt": ["a", "c"], "response": ["b", "d"]}), tmp_path / "t.parquet")
    assert read_records(str(tmp_path / "t.parquet"))[1] == {"prompt": "c", "response": "d"}
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
    parquet.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(DataError, match=r"twice\.parquet has two columns 'text'"):
        read_records(str(tmp_path / "twice.parquet"))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"broken\.parquet is not a readable Parquet file"):
        read_records(str(tmp_path / "broken.parquet"))


def test_limit_reads_no_further(tmp_path: Path) -> None:
    source = lines(tmp_path / "t.jsonl", *TWO, "not an object")
    assert read_records(source, limit=2) == TWO
    with pytest.raises(ConfigError, match="limit of records is 0"):
        read_records(source, limit=0)


def test_fields_by_name_and_by_template(tmp_path: Path) -> None:
    source = lines(tmp_path / "t.jsonl", {"instruction": "{output} {0.__class__}", "input": "x", "output": "y", "n": 3})
    fields = {"prompt": "{instruction}\n{input} {{{n}}}", "response": "output"}
    (record,) = read_records(source, fields=fields)
    assert record["prompt"] == "{output} {0.__class__}\nx {3}"
    assert (record["response"], record["n"], record["output"]) == ("y", 3, "y")


def test_fields_may_swap(tmp_path: Path) -> None:
    source = lines(tmp_path / "t.jsonl", {"prompt": "a", "response": "b"})
    (record,) = read_records(source, fields={"prompt": "response", "response": "prompt"})
    assert record == {"prompt": "b", "response": "a"}


def test_a_prompt_that_is_mapped_wins_over_the_turns_of_the_source(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "v"}]
    source = lines(tmp_path / "t.jsonl", {"q": "a", "r": "b", "messages": turns})
    assert "messages" not in read_records(source, fields={"prompt": "q", "response": "r"})[0]
    assert read_records(source)[0]["messages"] == turns


CHAT = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "v"}]


@pytest.mark.parametrize(
    ("fields", "gone"),
    [
        ({"prompt": "q", "response": "r"}, {"messages", "text"}),
        ({"response": "r"}, {"messages", "text"}),
        ({"messages": "turns"}, {"text"}),
        ({"prompt": "q", "response": "r", "text": "q"}, {"messages"}),
        ({"text": "q"}, set()),
        ({"system": "q"}, set()),
        ({}, set()),
    ],
)
def test_what_is_mapped_wins_over_fields_of_the_source(tmp_path: Path, fields: dict[str, str], gone: set[str]) -> None:
    """`messages` would be used in place of prompt and response, and `text` in place of both by `lm`."""
    row = {"q": "a", "r": "b", "turns": CHAT, "prompt": "c", "response": "d", "messages": CHAT, "text": "e"}
    (record,) = read_records(lines(tmp_path / "t.jsonl", row), fields=fields)
    assert row.keys() - record.keys() == gone
    assert record == {**{name: row[name] for name in row.keys() - gone}, **{to: row[of] for to, of in fields.items()}}


@pytest.mark.parametrize("template", ["{q.__class__}", "{q[0]}"])
def test_templates_reach_into_nothing(tmp_path: Path, template: str) -> None:
    source = lines(tmp_path / "t.jsonl", {"q": "a"})
    with pytest.raises(DataError, match=r"t\.jsonl:1 has no field 'q(\.__class__|\[0\])' to make 'text' from"):
        read_records(source, fields={"text": template})


@pytest.mark.parametrize("template", ["{}", "{q!r}", "{q:>9}", "{q", "q}", "{q:{q}}"])
def test_templates_hold_names_and_nothing_else(tmp_path: Path, template: str) -> None:
    with pytest.raises(ConfigError, match="for field 'text' is no template"):
        read_records(lines(tmp_path / "t.jsonl", {"q": "a"}), fields={"text": template})


def test_a_template_takes_text_and_numbers_alone(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"t\.jsonl:1: 'q' is not text or a number"):
        read_records(lines(tmp_path / "t.jsonl", {"q": ["a"]}), fields={"text": "{q}"})


def test_a_missing_field_is_named_with_its_line_and_its_neighbour(tmp_path: Path) -> None:
    source = lines(tmp_path / "t.jsonl", {"instruction": "a", "output": "b"}, {"instructions": "a", "output": "b"})
    wanted = r"t\.jsonl:2 has no field 'instruction' to make 'prompt' from; did you mean 'instructions'\?"
    with pytest.raises(DataError, match=wanted):
        read_records(source, fields={"prompt": "instruction", "response": "output"})


RIGHT = {"prompt": "q", "choices": ["x", "yes", "z"], "answer": 1}


@pytest.mark.parametrize("answer", [1, "B", "b", "yes"])
def test_answers_of_multiple_choice_become_an_index(tmp_path: Path, answer: object) -> None:
    (record,) = read_records(lines(tmp_path / "t.jsonl", {**RIGHT, "answer": answer}))
    assert record["answer"] == 1


@pytest.mark.parametrize(("answer", "found"), [("B", 1), ("yes", 1), (2, 2), ("no", "no"), (3, 3), (None, None)])
def test_turns_may_have_choices_and_fields_of_that_name(tmp_path: Path, answer: object, found: object) -> None:
    row = {"messages": CHAT, "choices": ["x", "yes", "z"], "answer": answer}
    (record,) = read_records(lines(tmp_path / "t.jsonl", row))
    assert record == {**row, "answer": found}
    assert read_records(lines(tmp_path / "t.jsonl", {**row, "choices": "A, B"}))[0]["answer"] == answer


CALLS = [{"function": {"name": "clock", "arguments": {}}}]


@pytest.mark.parametrize("turn", [{"content": None}, {}, {"content": ""}])
def test_a_turn_that_calls_tools_may_be_without_text(tmp_path: Path, turn: dict[str, Any]) -> None:
    row = {"messages": [{"role": "assistant", "tool_calls": CALLS, **turn}]}
    assert read_records(lines(tmp_path / "t.jsonl", row)) == [row]


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": []}]},
            "'messages' must be a list of turns",
        ),
        (
            {"messages": [{"role": "assistant", "content": "a", "tool_calls": "b"}]},
            "'messages' must be a list of turns",
        ),
        ({"prompt": "a", "response": 3}, r"'response' must be text .* but it is 3"),
        ({"prompt": None, "response": "b"}, "'prompt' must be text .* but it is None"),
        ({"prompt": "a", "response": "b", "system": 1}, "'system' must be text"),
        ({"text": ["a"]}, "'text' must be text"),
        ({"messages": "hello"}, "'messages' must be a list of turns"),
        ({"messages": [{"role": "user", "content": "a"}]}, "one of them by the assistant"),
        ({"messages": [{"role": "assistant"}]}, "'messages' must be a list of turns"),
        ({**RIGHT, "choices": "xyz"}, "'choices' must be a list of two texts or more"),
        ({**RIGHT, "answer": 3}, "'answer' is 3, which is none of 3 choices"),
        ({**RIGHT, "answer": -1}, "'answer' is -1, which is none of 3 choices"),
        ({**RIGHT, "answer": "D"}, "'answer' is 'D', which is none of 3 choices"),
        ({**RIGHT, "answer": "no"}, "'answer' is 'no', which is none"),
        ({**RIGHT, "answer": True}, "'answer' must be the index"),
        ({"question": "a", "answer": "b"}, "holds question, answer; name in `fields` which of them are prompt"),
    ],
)
def test_wrong_values_are_named_with_file_and_line(tmp_path: Path, row: dict[str, Any], sentence: str) -> None:
    source = lines(tmp_path / "t.jsonl", {"text": "fine"}, row)
    with pytest.raises(DataError, match=rf"t\.jsonl:2:? .*{sentence}"):
        read_records(source)


def test_a_system_of_null_is_no_system(tmp_path: Path) -> None:
    assert read_records(lines(tmp_path / "t.jsonl", {"text": "a", "system": None})) == [{"text": "a"}]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("t.jsonl", b'{"text": "a"}\n\n{"text": \n', r"t\.jsonl:3 is not JSON \(.*column \d+\); each line"),
        ("t.jsonl", b'{"text": "a"}\n[1]\n', r"t\.jsonl:2 is a list; each line must hold one JSON object"),
        ("t.json", b'[{"text": "a"},\n {"text" 1}]', r"t\.json:2 is not JSON"),
        ("t.json", b'[{"text": "a"}, 5]', r"t\.json, item 2 is a number; each item"),
        ("t.csv", b"prompt,response\na,b\na\n", r"t\.csv:3 has not the 2 cells that the header names"),
        ("t.csv", b"prompt,response\na,b,c\n", r"t\.csv:2 has not the 2 cells"),
        ("t.csv", b'prompt,response\na,"b" c\n', r"t\.csv:2 is not CSV"),
        ("t.csv", b'prompt,response\na,b\nc,"d\ne,f\n', r"t\.csv:3 is not CSV"),
        ("t.jsonl", b'{"text": "\xff"}\n', r"t\.jsonl is not UTF-8 text"),
        ("t.jsonl.gz", b"not gzip", r"t\.jsonl\.gz cannot be read"),
        ("t.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9], r"t\.jsonl\.gz cannot be read"),
        ("t.jsonl", b'{"text": "a"}\n{"text": "a", "n": 1, "n": 2}', r"t\.jsonl:2 has the key 'n' twice; keep one"),
        (
            "t.jsonl",
            b'{"text": "a", "n": {"m": [{"o": 1, "o": 1}]}}',
            r"t\.jsonl:1 has the key 'o' twice",
        ),
        ("t.json", b'[{"text": "a"},\n {"text": "a", "text": "b"}]', r"t\.json, item 2 has the key 'text' twice"),
        ("t.json", b'[{"text": "a", "n": [{"o": 1, "o": 1}]}]', r"t\.json, item 1 has the key 'o' twice"),
        ("t.csv", b"prompt,response,response\na,b,\n", r"t\.csv has two columns 'response'; rename or remove one"),
        ("t.jsonl", b'{"text": "a"}\n{"text": "\\ud83c"}', r"t\.jsonl:2 holds \\ud83c, half of a surrogate pair"),
        ("t.jsonl", b'{"text": "a", "n": [{"\\uDF55": 1}]}', r"t\.jsonl:1 holds \\udf55, half of a surrogate pair"),
        ("t.json", b'[{"text": "a"}, {"text": "\\ud83c!"}]', r"t\.json, item 2 holds \\ud83c, half of a surrogate"),
        ("t.jsonl", b"\n\n", r"t\.jsonl holds no records"),
        ("t.csv", b"prompt,response\n", r"t\.csv holds no records"),
        ("t.txt", b"hello", r"t\.txt is not a file that ends in \.csv, \.json"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        read_records(str(tmp_path / name))


def test_what_is_near_to_damage(tmp_path: Path) -> None:
    whole = "\N{SLICE OF PIZZA}"
    assert read_records(lines(tmp_path / "t.jsonl", {"text": whole})) == [{"text": whole}]  # written as a pair
    long = "a pear, " * 20_000  # more letters than the csv module takes at first
    (tmp_path / "t.csv").write_text(f'text,,\nb,,\n"{long}",,\n')  # columns without a name, as spreadsheets leave them
    assert [record["text"] for record in read_records(str(tmp_path / "t.csv"))] == ["b", long]
    (tmp_path / "t.csv").write_text(f'text\nb\n"{long}\n')
    with pytest.raises(DataError, match=r"t\.csv:3 is not CSV \(unexpected end of data\)"):
        read_records(str(tmp_path / "t.csv"))


def test_missing_files_name_their_neighbour(tmp_path: Path) -> None:
    lines(tmp_path / "train.jsonl", {"text": "a"})
    with pytest.raises(DataError, match=r"there is no file .*trian\.jsonl; did you mean 'train\.jsonl'\?"):
        read_records(str(tmp_path / "trian.jsonl"))
    with pytest.raises(DataError, match=r"there is no folder .*nowhere either"):
        read_records(str(tmp_path / "nowhere" / "t.jsonl"))
    with pytest.raises(DataError, match="is not a file that ends in"):
        read_records(str(tmp_path))


def test_unknown_names_name_the_nearest() -> None:
    with pytest.raises(DataError, match=r"'quickstrat' is neither .*; did you mean 'quickstart'\?"):
        read_records("quickstrat")


def test_packaged_data_takes_fields_and_limit() -> None:
    records = read_records("handbook", fields={"text": "{prompt} {response}"}, limit=2)
    assert len(records) == 2
    assert records[0]["text"] == f"{records[0]['prompt']} {records[0]['response']}"


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("org/set", ("org/set", None, "train")),
        ("org/set:test[:5]", ("org/set", None, "test[:5]")),
        ("org/set/main:test", ("org/set", "main", "test")),
    ],
)
def test_hub(monkeypatch: pytest.MonkeyPatch, source: str, wanted: tuple[str, str | None, str]) -> None:
    asked = []

    def load_dataset(name: str, config: str | None, *, split: str) -> list[dict[str, Any]]:
        asked.append((name, config, split))
        return [{"q": "a"}, {}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert read_records(source, fields={"text": "q"}, limit=1) == [{"q": "a", "text": "a"}]
    assert asked == [wanted]
    with pytest.raises(DataError, match=r"org/set.*, row 2 has no field 'q'"):
        read_records(source, fields={"text": "q"})


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, config: str | None, *, split: str) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError, match=r"^'org/set' is no file here.*check the name and the connection \(no route\)$"):
        read_records("org/set")


def test_hub_without_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"datasets is not installed; install it with: pip install 'fedllm\[data\]'"):
        read_records("org/set")


@pytest.mark.slow
def test_jsonl_brings_no_table_library_along(tmp_path: Path) -> None:
    source = lines(tmp_path / "t.jsonl", *({"text": "a", "user": user} for user in "abab"))
    code = f"""
import sys
from fedllm.data.partition import partition, report
from fedllm.data.records import read_records
from fedllm.data.partitioners import By, Iid
from fedllm.rng import Key
records = read_records({source!r})
assert list(partition(records, By("user"), clients=None, key=Key(0)).clients) == ["a", "b"]
report(records, partition(records, Iid(), clients=2, key=Key(0)), "user")
heavy = {{"datasets", "pandas", "pyarrow", "flwr_datasets", "plotly", "transformers"}}
sys.exit(", ".join(heavy & set(sys.modules)) or None)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
