"""fedllm where `fcntl` and `resource` are missing, as on Windows."""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

import fedllm
from fedllm import files
from fedllm.data import lazy_records
from fedllm.engines import process_memory
from fedllm.engines.batched import memory
from fedllm.errors import RunError
from fedllm.events import RoundStarted
from fedllm.runs import artifacts, lock
from tests.runs.small import adapter_hash, small, write_records

PACKAGE = Path(fedllm.__file__).parent
POSIX = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "posix"}


@pytest.fixture
def masked(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Files and figures of memory as they are where both modules are missing, and `os` has no `pread`."""
    for name in ("fcntl", "resource"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delattr(os, "pread", raising=False)
    found = {}
    for path in ("files.py", "engines/process_memory.py"):
        spec = importlib.util.spec_from_file_location("fedllm_masked", PACKAGE / path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found |= vars(module)
    assert found["fcntl"] is None and found["resource"] is None
    return SimpleNamespace(**found)


def test_two_modules_alone_ask_for_what_windows_lacks() -> None:
    asking = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            asking |= {path.name for name in names if name.split(".")[0] in POSIX}
    assert asking == {"files.py", "process_memory.py"}


def test_a_run_needs_neither(masked: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits, and one process at a time in a folder, which holds no more than it does elsewhere."""
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path / "cache"))
    experiment = small(write_records(tmp_path / "people.jsonl"), rounds=1)
    usual = fedllm.run(experiment, out=tmp_path / "usual", engine="serial")
    monkeypatch.setattr(lock, "exclusive", masked.exclusive)
    monkeypatch.setattr(lazy_records, "read_at", masked.read_at)
    monkeypatch.setattr(artifacts, "peak_memory", masked.peak_memory)
    for name in ("address_space", "free_memory", "held_memory", "mapped_memory"):
        monkeypatch.setattr(memory, name, getattr(masked, name))

    def again(event: object) -> None:
        if isinstance(event, RoundStarted):
            with pytest.raises(RunError, match="another process is running"):
                fedllm.run(experiment, out=tmp_path / "run", resume=True)

    made = fedllm.run(experiment, out=tmp_path / "run", listeners=[again], engine="serial")
    assert adapter_hash(tmp_path / "run") == adapter_hash(usual.folder)
    assert {path.name for path in made.folder.iterdir()} == {path.name for path in usual.folder.iterdir()}
    assert made.summary["peak_rss_bytes"] > 50 << 20


def test_figures_of_memory_need_neither(masked: SimpleNamespace) -> None:
    held = psutil.Process().memory_info().rss
    assert masked.peak_memory() == pytest.approx(held, rel=0.1)
    assert masked.address_space() is None
    assert masked.free_memory() == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    assert process_memory.peak_memory() >= process_memory.held_memory()[0] > 50 << 20


def test_threads_share_a_file_without_pread(masked: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(range(256)) * 64)
    found: list[bool] = []
    with (tmp_path / "file").open("rb") as file:

        def read(place: int) -> None:
            found.extend(masked.read_at(file.fileno(), 1, at) == bytes([at % 256]) for at in range(place, 16384, 7))

        threads = [threading.Thread(target=read, args=(place,)) for place in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) > 9000 and all(found)


def test_windows_has_no_list_of_a_folder_to_wait_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[int] = []
    (tmp_path / "file").write_bytes(b"1")
    monkeypatch.setattr(os, "fsync", waited.append)
    monkeypatch.setattr(files.os, "name", "nt")
    folder, file = str(tmp_path), str(tmp_path / "file")
    monkeypatch.setattr(files.Path, "is_dir", lambda path: str(path) == folder)
    files.sync(type(tmp_path)(folder))
    assert waited == []
    files.sync(type(tmp_path)(file))
    assert len(waited) == 1
