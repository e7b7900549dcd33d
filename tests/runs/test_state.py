"""What is saved comes back to the bit, and whatever breaks leaves what was saved before."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fedllm import files
from fedllm.engines.checksummed_files import read_facts, read_tree
from fedllm.engines.client_store import ClientStore
from fedllm.errors import RunError
from fedllm.rng import Key
from fedllm.runs import checkpoints as saving
from fedllm.runs.checkpoints import Checkpoints
from fedllm.runs.state import ServerState, Totals
from fedllm.tensors import tree
from fedllm.tensors.base_delta import BaseDelta
from fedllm.tensors.tree import Tree

PARAMS: Tree = {
    "layers.0/lora_A": torch.tensor([[0.1, -0.0, float("nan")]], dtype=torch.bfloat16),
    "state0/w": torch.arange(6.0).reshape(2, 3).T,
    "n": torch.tensor(2**53 + 1),
    "empty": torch.zeros(0, 4, dtype=torch.float64),
}
RUN = ServerState(
    params=PARAMS,
    states=({}, {"params/m": torch.tensor([1e-40]), "same": PARAMS["state0/w"]}, {}),
    round=3,
    key=Key(2**64 - 1),
    totals=Totals(1, 2, 3, 2**60, 0.1),
    best=(2, 0.1 + 0.2),
    pending=({"event": "warned", "text": "Zoë"},),
    base_delta=BaseDelta({1: {"layer.lora_BA": torch.ones(2, 3)}, 3: {"layer.lora_A": torch.arange(3.0)[None]}}),
    seen={"a": 1, "b/c": 3},
)


def assert_same(one: ServerState, two: ServerState | None) -> None:
    assert two is not None and tree.digest(one.params) == tree.digest(two.params)
    assert list(map(tree.digest, one.states)) == list(map(tree.digest, two.states))
    assert tree.digest(one.base_delta.joined_trees()) == tree.digest(two.base_delta.joined_trees())
    assert one.base_delta.version == two.base_delta.version
    bare, other = (replace(run, params={}, states=(), pending=(), base_delta=None) for run in (one, two))
    assert bare == other and list(one.pending) == list(two.pending)


def at(number: int, *, best: int | None = None) -> ServerState:
    """A run whose parameters show its round."""
    return ServerState(
        {"w": torch.tensor(float(number))}, (), number, Key(0), best=None if best is None else (best, 1.0)
    )


def test_totals_add_up_field_by_field() -> None:
    one, two = Totals(1, 2, 3, 4, 5.5), Totals(10, 20, 30, 40, 50.0)
    assert one.plus(two) == Totals(11, 22, 33, 44, 55.5)
    assert Totals().plus(one) == one


def test_a_run_comes_back_to_the_bit(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_last=2)
    assert checkpoints.rounds() == [] and checkpoints.load() is None and checkpoints.load(3) is None
    checkpoints.save(RUN)
    assert_same(RUN, checkpoints.load())
    assert_same(RUN, Checkpoints(tmp_path / "checkpoints", keep_last=2).load(3))
    assert checkpoints.load(2) is None
    bare = ServerState({}, (), 4, Key(0))
    checkpoints.save(bare)
    assert_same(bare, checkpoints.load())


def test_a_round_may_be_saved_again(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for text in ("one", "two"):
        checkpoints.save(replace(RUN, pending=({"text": text},)))
    found = checkpoints.load()
    assert found is not None and list(found.pending) == [{"text": "two"}]
    assert [path.name for path in tmp_path.iterdir()] == ["round-000003"]


@pytest.mark.parametrize(
    ("keep_last", "best", "kept"),
    [(1, None, [9]), (3, None, [7, 8, 9]), (2, 4, [4, 8, 9]), (2, 9, [8, 9]), (99, 0, [*range(10)])],
)
def test_the_last_and_the_best_are_kept(tmp_path: Path, keep_last: int, best: int | None, kept: list[int]) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last)
    for number in range(10):
        checkpoints.save(at(number, best=None if best is None or best > number else best))
    assert checkpoints.rounds() == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"round-{number:06d}" for number in kept]
    for number in kept:
        found = checkpoints.load(number)
        assert found is not None and float(found.params["w"]) == number
    newest = checkpoints.load()
    assert newest is not None and newest.round == 9


def test_rounds_are_ordered_by_number_and_other_files_are_passed_over(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=3)
    checkpoints.save(at(1_000_000))
    checkpoints.save(at(999_999))
    for name in (".round-2000000.part", ".round-2000000.gone", "round-2000000.part", "round-x", "clients"):
        (tmp_path / name).mkdir()
    assert checkpoints.rounds() == [999_999, 1_000_000]
    newest = checkpoints.load()
    assert newest is not None and newest.round == 1_000_000


class Crash(BaseException):
    """The process ends here."""


FAULTS = {
    "full disk": OSError(errno.ENOSPC, "No space left on device"),
    "crash": Crash(),
    "interrupt": KeyboardInterrupt(),
}


def breaking(function: Callable[..., object], fault: BaseException, after: int) -> Callable[..., object]:
    """A function whose call number `after` raises."""
    calls = iter(range(10**6))

    def broken(*given: object, **settings: object) -> object:
        if next(calls) == after:
            raise fault
        return function(*given, **settings)

    return broken


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    ("where", "name", "after"),
    [
        (saving, "write_durably", 0),
        (saving, "write_durably", 1),
        (os, "replace", 0),
        (os, "fsync", 0),
        (os, "fsync", 2),
        (files, "sync", 0),
    ],
)
def test_what_breaks_in_the_middle_leaves_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: ModuleType, name: str, after: int, fault: str
) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    checkpoints.save(at(1))
    with monkeypatch.context() as patch:
        patch.setattr(where, name, breaking(where.__dict__[name], FAULTS[fault], after))
        with pytest.raises(RunError if fault == "full disk" else type(FAULTS[fault])) as caught:
            checkpoints.save(at(2))
    if fault == "full disk":
        assert "round-000002 could not be written (No space left on device)" in str(caught.value)
        assert "make room" in str(caught.value)
    assert checkpoints.rounds() == [1]
    found = Checkpoints(tmp_path, keep_last=1).load()
    assert found is not None and float(found.params["w"]) == 1
    checkpoints.save(at(2))  # and the next attempt succeeds
    assert [path.name for path in tmp_path.iterdir()] == ["round-000002"]


def test_a_killed_process_leaves_nothing_that_looks_like_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is tidied up: neither the half of a new checkpoint nor the half of one that is being dropped."""
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    checkpoints.save(at(1))
    with monkeypatch.context() as patch:
        patch.setattr(saving, "write_durably", breaking(saving.write_durably, Crash(), 1))
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(Crash):
            checkpoints.save(at(2))
    assert (tmp_path / ".round-000002.part" / "server.safetensors").exists()
    found = checkpoints.load()
    assert checkpoints.rounds() == [1] and found is not None and found.round == 1

    def half(folder: Path, **_: object) -> None:
        if folder.exists() and "000001" in folder.name:
            (folder / "run.json").unlink()
            raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", half)
        shutil.os.rename(tmp_path / ".round-000002.part", tmp_path / "elsewhere")  # type: ignore[attr-defined]
        with pytest.raises(Crash):
            checkpoints.save(at(2))
    found = checkpoints.load()
    assert checkpoints.rounds() == [2] and found is not None and found.round == 2


@pytest.mark.parametrize("file", ["server.safetensors", "run.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"\0" * 64, b"[]", None])
def test_a_checkpoint_that_cannot_be_read_is_named(tmp_path: Path, file: str, content: bytes | None) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    checkpoints.save(at(1))
    checkpoints.save(RUN)
    path = tmp_path / "round-000003" / file
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(
        RunError, match=rf"round-000003/{file} cannot be read .*delete .*round-000003 to go on from round-000001"
    ) as caught:
        checkpoints.load()
    assert "\n" not in str(caught.value)
    files.remove_folder(tmp_path / "round-000001")
    with pytest.raises(RunError, match=rf"round-000003/{file} cannot be read .*no checkpoint before it is left"):
        checkpoints.load()


def flipped(path: Path, place: int) -> None:
    """With one bit turned over."""
    content = bytearray(path.read_bytes())
    content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["server.safetensors", "run.json"])
def test_one_flipped_bit_of_a_checkpoint_is_found(tmp_path: Path, file: str) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    checkpoints.save(replace(RUN, remembered={"Zoë": 3}))
    path = tmp_path / "round-000003" / file
    whole, found = path.read_bytes(), 0
    places = range(0, 8 * len(whole), max(1, 8 * len(whole) // 60) | 1)  # an odd step, so that it comes to every bit
    for place in places:
        flipped(path, place)
        try:
            same = checkpoints.load()
        except RunError as error:
            assert str(path) in str(error) and "no checkpoint before it" in str(error)
            found += 1
        else:  # the name under which the checksum stands
            assert_same(replace(RUN, remembered={"Zoë": 3}), same)
        path.write_bytes(whole)
    assert found >= 0.95 * len(places)
    values = 8 * (len(whole) - 1)
    if file == "server.safetensors":  # the last byte is of a value
        flipped(path, values)
        with pytest.raises(RunError, match=r"is damaged: it is not what was written there"):
            checkpoints.load()


def test_one_flipped_bit_of_a_memory_is_found(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    store.save("a", 1, memories(1))
    path = tmp_path / "a" / "000001.safetensors"
    flipped(path, 8 * path.stat().st_size - 1)
    with pytest.raises(RunError, match=r"a/000001\.safetensors is damaged.*client a cannot take part"):
        store.load("a", 1, 3)


def test_files_without_a_checksum_are_read(tmp_path: Path) -> None:
    """Those of earlier versions."""
    save_file({"memory0/h": torch.ones(2)}, (tmp_path / "a.safetensors"))
    assert torch.equal(read_tree(tmp_path / "a.safetensors", "")["memory0/h"], torch.ones(2))
    (tmp_path / "run.json").write_text('{"round": 3}')
    assert read_facts(tmp_path / "run.json", "") == {"round": 3}


def test_a_memory_that_is_gone_is_named_with_its_client_and_round(tmp_path: Path) -> None:
    for store in stores(tmp_path):
        for number in (1, 2, 3):
            store.save("a", number, memories(number))
        assert store.newest(["a", "b"], 2) == {"a": 2} and store.newest(["a"], 9) == {"a": 3}
        store.require({"a": 3})
        with pytest.raises(RunError, match="what client b remembered after round 2 is gone"):
            store.require({"a": 3, "b": 2})


def stores(tmp_path: Path) -> tuple[ClientStore, ClientStore]:
    """In memory, and in a folder."""
    return ClientStore(None, keep=3), ClientStore(tmp_path / "clients", keep=3)


def memories(number: int) -> tuple[Tree, ...]:
    return {"memory1/h": torch.tensor(float(number)), "n": torch.tensor(number)}, {}, {"h": torch.tensor([0.5])}


def digests(found: tuple[Tree, ...]) -> list[str]:
    return list(map(tree.digest, found))


def test_memories_come_back_to_the_bit(tmp_path: Path) -> None:
    for store in stores(tmp_path):
        assert store.load("a", 0, 3) == ({}, {}, {})
        store.save("a", 1, (PARAMS, {}, {"same": PARAMS["state0/w"]}))
        store.save("Zoë-1.x", 1, memories(1))
        assert digests(store.load("a", 1, 3)) == digests((PARAMS, {}, {"same": PARAMS["state0/w"]}))
        assert digests(store.load("Zoë-1.x", 5, 3)) == digests(memories(1))
        assert store.load("b", 5, 2) == ({}, {})
    again = ClientStore(tmp_path / "clients", keep=3)
    assert digests(again.load("Zoë-1.x", 5, 3)) == digests(memories(1))
    assert {path.name for path in (tmp_path / "clients").iterdir()} == {"a", "Zoë-1.x"}


def test_clients_without_a_memory_leave_nothing(tmp_path: Path) -> None:
    for store in stores(tmp_path):
        store.save("a", 1, ({}, {}))
        assert store.load("a", 1, 2) == ({}, {})
    assert not (tmp_path / "clients").exists()


def test_a_memory_that_was_emptied_is_empty(tmp_path: Path) -> None:
    for store in stores(tmp_path):
        store.save("a", 1, memories(1))
        store.save("a", 2, ({}, {}, {}))
        assert store.load("a", 2, 3) == ({}, {}, {})
        assert digests(store.load("a", 1, 3)) == digests(memories(1))


@settings(max_examples=60)
@given(taken=st.sets(st.integers(0, 12)), keep=st.integers(0, 5))
def test_any_kept_round_can_be_run_again(tmp_path_factory: pytest.TempPathFactory, taken: set[int], keep: int) -> None:
    """A client that takes part in the rounds `taken` remembers the last one of them."""
    folder = tmp_path_factory.mktemp("clients")
    for store in (ClientStore(None, keep), ClientStore(folder, keep)):
        done: list[int] = []
        for number in range(13):
            if number in taken:
                store.save("a", number + 1, memories(number))
                done.append(number)
            newest = done[-1] + 1 if done else 0
            for again in range(max(0, newest - keep), number + 2):
                before = [past for past in done if past < again]
                expected = memories(before[-1]) if before else ({}, {}, {})
                assert digests(store.load("a", again, 3)) == digests(expected), (number, again)
    names = {path.name for path in folder.rglob("*.*")}
    assert len(names) <= keep + 2 and not any(name.endswith(".tmp") for name in names)


def test_a_forgotten_memory_is_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    for store in stores(tmp_path):
        for number in range(8):
            store.save("a", number + 1, memories(number))
        assert digests(store.load("a", 5, 3)) == digests(memories(4))
        with pytest.raises(RunError, match=r"client a remembered in round 4 is forgotten, .* round 5's"):
            store.load("a", 4, 3)


def test_a_round_that_is_run_again_replaces_its_memory(tmp_path: Path) -> None:
    for store in stores(tmp_path):
        for number in (0, 1, 2):
            store.save("a", number + 1, memories(number))
        store.save("a", 2, memories(100))
        assert digests(store.load("a", 2, 3)) == digests(memories(100))
        assert digests(store.load("a", 1, 3)) == digests(memories(0))


def test_clients_do_not_meet(tmp_path: Path) -> None:
    for store in stores(tmp_path):
        for number, client in enumerate(("a", "A.b", "a b", "é")):
            store.save(client, 1, memories(number))
        for number, client in enumerate(("a", "A.b", "a b", "é")):
            assert digests(store.load(client, 1, 3)) == digests(memories(number))


@pytest.mark.parametrize(
    "client", ["", ".", "..", "../a", "a/b", "/etc", "a\\b", "a\0b", "a\nb", "c:x", "x" * 300, "é" * 200]
)
def test_a_name_that_is_no_folder_is_refused(tmp_path: Path, client: str) -> None:
    store = ClientStore(tmp_path / "clients")
    with pytest.raises(RunError, match="cannot name a folder") as caught:
        store.save(client, 1, memories(1))
    assert "\n" not in str(caught.value)
    with pytest.raises(RunError, match="cannot name a folder"):
        store.load(client, 1, 3)
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize("where", ["fsync", "replace"])
@pytest.mark.parametrize("first", [True, False])
def test_a_full_disk_leaves_the_earlier_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, first: bool
) -> None:
    store = ClientStore(tmp_path)
    if not first:
        store.save("a", 1, memories(1))
    expected = digests(store.load("a", 1, 3))
    for after in (0, 1) if first else (0,):
        with monkeypatch.context() as patch:
            patch.setattr(os, where, breaking(os.__dict__[where], FAULTS["full disk"], after))
            with pytest.raises(RunError, match=r"could not be written \(No space left on device\)"):
                store.save("a", 2, memories(2))
        assert digests(store.load("a", 2, 3)) == expected
    store.save("a", 2, memories(2))
    assert digests(store.load("a", 2, 3)) == digests(memories(2))


def test_a_memory_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    store.save("a", 1, memories(1))
    (tmp_path / "a" / "000001.safetensors").write_bytes(b"\0")
    with pytest.raises(RunError, match=r"a/000001\.safetensors cannot be read .*client a cannot take part"):
        store.load("a", 1, 3)


def test_saving_looks_at_one_client_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many clients there are, a save and a load open the folder of theirs and no other."""
    store = ClientStore(tmp_path)
    for number in range(20):
        store.save(f"client-{number}", 1, memories(number))
    opened: list[str] = []

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def listing(path: Any = ".") -> Any:
            opened.append(str(path))
            return function(path)

        return listing

    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, watched(os.__dict__[name]))
    store.save("client-3", 2, memories(2))
    store.load("client-3", 2, 3)
    assert opened and all(path.endswith("client-3") for path in opened)
