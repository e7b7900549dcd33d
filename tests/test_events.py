"""Events and their log."""

from __future__ import annotations

import errno
import importlib
import json
import pkgutil
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fedllm
from fedllm import events
from fedllm.errors import RunError
from fedllm.events import KINDS, CheckpointSaved, Event, Resumed, RoundStarted, Warned, from_json, read, to_json
from fedllm.runs import event_log
from fedllm.runs.event_log import Log

NUMBERS = st.one_of(st.integers(-(2**60), 2**60), st.floats(allow_nan=False))


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Values of an event's field. Keys of mappings are text and there are no lists, for JSON has no tuples."""
    if typing.get_origin(hint) is not None and issubclass(typing.get_origin(hint), Mapping):
        return st.dictionaries(st.text(), values(typing.get_args(hint)[1]), max_size=3)
    known: dict[Any, st.SearchStrategy[Any]] = {
        str: st.text(),
        bool: st.booleans(),
        int: st.integers(),
        float: st.floats(allow_nan=False),
        float | None: st.one_of(st.none(), st.floats(allow_nan=False)),
        int | None: st.one_of(st.none(), st.integers()),
        tuple[str, ...]: st.lists(st.text(), max_size=3).map(tuple),
        tuple[float, ...]: st.lists(st.floats(allow_nan=False), max_size=3).map(tuple),
        Any: st.recursive(st.one_of(st.none(), st.booleans(), NUMBERS, st.text()), st.lists, max_leaves=4),
    }
    return known[hint]


def some(cls: type[Event]) -> st.SearchStrategy[Event]:
    hints = typing.get_type_hints(cls)
    return st.builds(cls, **{item.name: values(hints[item.name]) for item in fields(cls)})


def every_event() -> set[type[Event]]:
    """Event and all that derive from it, in any module of fedllm."""
    for module in pkgutil.walk_packages(fedllm.__path__, "fedllm."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    found: set[type[Event]] = set()
    todo = [Event]
    while todo:
        cls = todo.pop()
        found.add(cls)
        todo += cls.__subclasses__()
    return found


def test_every_event_has_its_kind() -> None:
    assert set(KINDS.values()) == every_event() - {Event}
    assert KINDS["round_started"] is RoundStarted
    assert [name for name, cls in KINDS.items() if events.kind(cls) != name] == []


@pytest.mark.parametrize("cls", KINDS.values(), ids=KINDS)
@settings(max_examples=15)
@given(data=st.data())
def test_events_come_back_from_a_line(cls: type[Event], data: st.DataObject) -> None:
    event = data.draw(some(cls))
    line = json.dumps(to_json(event))
    assert "\n" not in line and json.loads(line)["event"] == events.kind(cls)
    assert from_json(json.loads(line)) == event


@pytest.mark.parametrize("cls", KINDS.values(), ids=KINDS)
@settings(max_examples=15)
@given(data=st.data())
def test_a_newer_version_may_add_and_no_version_may_leave_out(cls: type[Event], data: st.DataObject) -> None:
    event = data.draw(some(cls))
    assert from_json({**to_json(event), "colour": "red"}) == event
    required = [item.name for item in fields(cls) if item.default is MISSING and item.default_factory is MISSING]
    record = to_json(event)
    del record[required[0]]
    with pytest.raises(RunError, match=required[0]):
        from_json(record)


def test_unknown_kinds_are_passed_over(tmp_path: Path) -> None:
    assert from_json({"event": "sun_rose", "round": 3}) is None
    path = tmp_path / "events.jsonl"
    path.write_text('{"at": 1.5, "event": "sun_rose"}\n{"at": 2.5, "event": "resumed", "round": 3, "colour": 1}\n')
    assert list(read(path)) == [(2.5, Resumed(3))]


def test_log_appends_flushes_and_tells_in_order(tmp_path: Path) -> None:
    path, heard = tmp_path / "events.jsonl", list[Event]()
    log = Log(path, (heard.append,))
    for number, event in enumerate([Resumed(1), Warned("Zoë\nsays"), CheckpointSaved(2)], 1):
        log(event)
        lines = path.read_bytes().splitlines(keepends=True)  # before the log is closed
        assert len(lines) == number and lines[-1].endswith(b"\n")
    log.close()
    again = Log(path)
    again(Resumed(2))
    again.close()
    assert [event for _, event in read(path)] == [Resumed(1), Warned("Zoë\nsays"), CheckpointSaved(2), Resumed(2)]
    assert heard == [Resumed(1), Warned("Zoë\nsays"), CheckpointSaved(2)]
    times = [at for at, _ in read(path)]
    assert times == sorted(times) and times[0] > 1.6e9


def test_log_without_a_file_tells_its_listeners() -> None:
    heard: list[Event] = []
    log = Log(None, (heard.append, heard.append))
    log(Resumed(1))
    log.close()
    assert heard == [Resumed(1), Resumed(1)]


LONG = json.dumps({"at": 1.0, "event": "warned", "text": "x" * (event_log.BLOCK + 7)})


@pytest.mark.parametrize(
    ("whole", "torn"),
    [
        ("", ""),
        ("", '{"at": 1.0, "ev'),
        ('{"at": 1.0, "event": "resumed", "round": 1}\n', ""),
        ('{"at": 1.0, "event": "resumed", "round": 1}\n', '{"at": 1.0, "event": "resumed", "round": 2}'),
        (LONG + "\n", LONG),
        (LONG + "\n", ""),
        ("", LONG),
    ],
)
def test_a_torn_last_line_is_dropped(tmp_path: Path, whole: str, torn: str) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(whole + torn)
    before = [event for _, event in read(path)]  # a reader passes over it as well
    log = Log(path)
    assert path.read_text() == whole
    log(Resumed(9))
    log.close()
    assert [event for _, event in read(path)] == [*before, Resumed(9)]
    assert len(before) == whole.count("\n")


@pytest.mark.parametrize(
    "line", ["\0\0\0", "[]", "{}", '"text"', '{"at": 1.0, "event": "resumed"}', '{"event": 3}', ""]
)
def test_a_line_that_is_no_event_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"at": 1.0, "event": "resumed", "round": 1}\n' + line + "\n")
    found = read(path)
    assert next(found) == (1.0, Resumed(1))
    with pytest.raises(RunError, match=r"events\.jsonl, line 2"):
        next(found)


class Disk:
    """A file on a disk with room for some bytes more."""

    def __init__(self, room: int) -> None:
        self.room = room

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return min(self.room, len(data))


@pytest.mark.parametrize("room", [0, 10])
def test_a_full_disk_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    heard: list[Event] = []
    log = Log(tmp_path / "events.jsonl", (heard.append,))
    monkeypatch.setattr(log, "_file", Disk(room))
    with pytest.raises(RunError, match=r"events\.jsonl .*resume"):
        log(Resumed(1))
    assert heard == []  # what is not in the log has not happened
