"""Records that are read when they are asked for: the same as read at once, and no more than is asked for."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

import fedllm
from fedllm.data import lazy_records
from fedllm.data.federation import ConcatRecords
from fedllm.data.lazy_records import JsonlRecords, open_records, view
from fedllm.data.records import read_records
from fedllm.errors import DataError, RunError, place_of

pytestmark = pytest.mark.usefixtures("cache_folder")

TWO = [{"prompt": "a", "response": "b"}, {"prompt": "c\nd", "response": 'é, "x"\u2028', "extra": "7", "n": [1, 2.5]}]
TEXT = "\n".join(json.dumps(row, ensure_ascii=False) for row in TWO)
FILES: dict[str, bytes] = {
    "plain.jsonl": TEXT.encode(),
    "ended.jsonl": f"{TEXT}\n\n".encode(),
    "marked.json": f"\ufeff\n\n{TEXT}\n".encode(),
    "windows.jsonl": TEXT.replace("\n", "\r\n\r\n").encode(),
    "old mac.jsonl": TEXT.replace("\n", "\r").encode(),
    "mixed.JSONL": f"  {TEXT}".replace("\n", " \r\n\r \n").encode(),
    "other spaces.jsonl": f"\n{TEXT}".replace("\n", "\n\u00a0\n\u2003 \r\n").encode(),
    "packed.jsonl.gz": gzip.compress(TEXT.encode(), mtime=0),
    "array.json": json.dumps(TWO, indent=1).encode(),
    "table.csv": 'prompt,response\r\na,b\r\n"c\nd","é, ""x"""\r\n'.encode(),
}


def write(folder: Path, rows: list[Any]) -> str:
    path = folder / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


@pytest.mark.parametrize("name", FILES)
def test_equal_to_what_is_read_at_once(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    source = str(tmp_path / name)
    records = open_records(source)
    assert isinstance(records, JsonlRecords)
    assert list(records) == read_records(source) == [records[0], records[-1]]
    assert list(records) == TWO or name == "table.csv"
    assert len(records) == 2
    with pytest.raises(IndexError):
        records[2]


PLACES = {
    "plain.jsonl": (":1", ":2"),
    "windows.jsonl": (":1", ":3"),
    "old mac.jsonl": (":1", ":2"),
    "marked.json": (":3", ":4"),
    "other spaces.jsonl": (":4", ":7"),
    "packed.jsonl.gz": (":1", ":2"),
    "array.json": (", item 1", ", item 2"),
    "table.csv": (":2", ":4"),  # where it ends
}


@pytest.mark.parametrize("name", PLACES)
def test_records_know_their_places(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    records = open_records(str(tmp_path / name))
    expected = [f"{tmp_path / name}{place}" for place in PLACES[name]]
    for read in (records, view(records, [0, 1]), read_records(str(tmp_path / name)), deepcopy(list(records))):
        assert [place_of(record) for record in read] == expected


def test_records_of_the_package_and_of_tables_know_their_places(tmp_path: Path) -> None:
    assert place_of(open_records("quickstart")[2]) == "quickstart, record 3"
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["a", "b"]}), tmp_path / "t.parquet")
    assert place_of(open_records(str(tmp_path / "t.parquet"))[1]) == f"{tmp_path / 't.parquet'}, row 2"
    assert place_of({"text": "a"}) is None


def test_fields_and_forms_are_applied_to_each_record_on_access(tmp_path: Path) -> None:
    right, wrong = {"q": "a", "choices": ["x", "y"], "answer": "B"}, {"q": "b", "choices": "xy", "answer": 0}
    source = write(tmp_path, [right, wrong])
    fields = {"prompt": "{q}?"}
    with pytest.raises(DataError, match=r"t\.jsonl:2: 'choices' must be a list"):
        open_records(source, fields=fields)
    source = write(tmp_path, [right])
    assert open_records(source, fields=fields)[0] == {"q": "a", "prompt": "a?", "choices": ["x", "y"], "answer": 1}


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("t.jsonl", b'{"text": "a"}\n\n{"text": \n', r"t\.jsonl:3 is not JSON"),
        ("t.jsonl", b'{"text": "a"}\r\n\r\n{"text": 3}\r\n', r"t\.jsonl:3: 'text' must be text"),
        ("t.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"t\.jsonl is not UTF-8 text \(line 2, byte 24\)"),
        ("t.jsonl", b"\n", r"t\.jsonl holds no records"),
        ("t.csv", b"text\na\nb,c\n", r"t\.csv:3 has not the 1 cells"),
        ("t.json", b'[{"text": "a"}, 5]', r"t\.json, item 2 is a number"),
        ("t.jsonl.gz", gzip.compress(b'{"text": "a"}\n[1]\n', mtime=0), r"t\.jsonl\.gz:2 is a list"),
        ("t.jsonl.gz", b"not gzip", r"t\.jsonl\.gz cannot be read"),
    ],
)
def test_everything_is_checked_when_it_is_opened(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        open_records(str(tmp_path / name))


def test_no_more_is_read_than_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = open_records(write(tmp_path, [{"text": str(row)} for row in range(1000)]))
    read = []
    pread = os.pread
    monkeypatch.setattr(
        lazy_records.os, "pread", lambda handle, count, at: read.append(count) or pread(handle, count, at)
    )
    some = view(records, [7, 3, 999])
    assert len(some) == 3 and len(some[1:]) == 2 and len(records[10:20]) == 10 and not read
    assert [record["text"] for record in some] == ["7", "3", "999"]
    assert some[-1] == some[1:][1] == records[900:][99] == {"text": "999"}
    assert len(read) == 6 and max(read) == len('{"text": "999"}\n')


def test_a_population_reads_its_clients_on_access(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": f"{who} {row}", "who": who} for row in range(20) for who in "abc"]
    shards = {"data": write(tmp_path, rows), "heldout": 0.25, "partition": {"by": "who"}}
    experiment = fedllm.build(
        {"task": {"model": "m"}, "federation": {"shards": shards}, "work": {"sgd": {"steps": 1}}, "method": "fedavg"}
    )
    population = experiment.federation.load(experiment.key)
    read = []
    pread = os.pread
    monkeypatch.setattr(lazy_records.os, "pread", lambda handle, count, at: read.append(at) or pread(handle, count, at))
    train, heldout = population.train["b"], population.heldout["b"]
    assert (len(train), len(heldout), read) == (15, 5, [])
    held = [record["text"] for record in (*train, *heldout)]
    assert sorted(held) == sorted(f"b {row}" for row in range(20)) and len(read) == 20
    kept = [int(record["text"][2:]) for record in train]
    assert kept == sorted(kept) and population.report.train == {"a": 15, "b": 15, "c": 15}


def test_a_file_that_changes_while_it_is_in_use_ends_the_run(tmp_path: Path) -> None:
    source = write(tmp_path, [{"text": "a"}, {"text": "b"}])
    records = open_records(source)
    with Path(source).open("a", encoding="utf-8") as file:
        file.write('{"text": "c"}\n')
    with pytest.raises(RunError, match=r"t\.jsonl was changed while it was in use; put it back"):
        records[0]


def test_a_file_that_is_replaced_is_still_read_as_it_was(tmp_path: Path) -> None:
    source = write(tmp_path, [{"text": "a"}])
    records = open_records(source)
    Path(source).unlink()
    write(tmp_path, [{"text": "other"}])
    assert records[0] == {"text": "a"}


def test_threads_share_the_records(tmp_path: Path) -> None:
    records = open_records(write(tmp_path, [{"text": str(row)} for row in range(500)]))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda row: records[row % 500]["text"], range(4000)))
    assert found == [str(row % 500) for row in range(4000)]


def test_unpacked_files_leave_nothing_behind(tmp_path: Path, cache_folder: Path) -> None:
    (tmp_path / "t.csv").write_text("text\na\n")
    records = open_records(str(tmp_path / "t.csv"))
    assert records[0] == {"text": "a"} and list(cache_folder.iterdir()) == []


def test_joined_is_end_to_end() -> None:
    parts = [[{"n": 0}], [], [{"n": 1}, {"n": 2}], [{"n": 3}]]
    joined = ConcatRecords(parts)
    assert [record["n"] for record in joined] == [joined[place]["n"] for place in range(4)] == [0, 1, 2, 3]
    assert len(joined) == 4 and joined[-1] == {"n": 3} and joined[1:3] == [{"n": 1}, {"n": 2}]
    assert len(ConcatRecords([])) == 0 and list(ConcatRecords([[]])) == []


GROWTH = """
import json, sys, tracemalloc
from fedllm.data.shards import Shards
from fedllm.data.partitioners import By
from fedllm.rng import Key
eager = []
tracemalloc.start()
population = Shards(data=sys.argv[1], partition=By("who")).load(Key(0))
held, _ = tracemalloc.get_traced_memory()
eager = [list(records) for records in (*population.train.values(), *population.heldout.values())]
print(json.dumps([held, tracemalloc.get_traced_memory()[0] - held]))
"""


@pytest.mark.slow
def test_memory_grows_with_the_clients_and_not_with_their_records(tmp_path: Path) -> None:
    """200 and 2,000 clients of 10 records of 1 kB: a fifth of what 10,000 clients may take, and less than they hold."""
    held, eager = [], []
    for clients in (200, 2000):
        rows = [{"text": f"{row:04}" * 250, "who": f"user-{who:05}"} for who in range(clients) for row in range(10)]
        done = subprocess.run(
            [sys.executable, "-c", GROWTH, write(tmp_path, rows)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        lazily, at_once = json.loads(done.stdout)
        held.append(lazily)
        eager.append(at_once)
    assert held[1] - held[0] < 5e6, held  # half of the bound's share: a run holds more than its population
    assert eager[1] - eager[0] > 15e6, eager  # the control: what the records themselves take
