"""Where the kernels come from, and what happens where they cannot be had."""

from __future__ import annotations

import os
import platform
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fedllm.errors import ConfigError, ModelError
from fedllm.models.kernels import build as module
from fedllm.models.kernels.build import library

needs_compiler = pytest.mark.skipif(module._compiler() is None, reason="no C compiler")


@pytest.fixture(autouse=True)
def forgetful(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call finds and compiles anew, in a cache of its own."""
    monkeypatch.setattr(sys.modules[__name__], "library", module.library.__wrapped__)
    monkeypatch.delenv("FEDLLM_KERNELS", raising=False)


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that notes what it is asked for."""
    log, script = tmp_path / "log", tmp_path / "compiler"
    script.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexec cc "$@"\n')
    script.chmod(0o700)
    monkeypatch.setenv("CC", str(script))
    return log


@pytest.fixture
def short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources that compile in a moment, where it does not matter what they compute."""
    folder = tmp_path / "sources"
    folder.mkdir()
    names = ("fedllm_has_tiles", "fedllm_has_products")
    (folder / "short.c").write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in names))
    monkeypatch.setattr(module, "HERE", folder)
    return folder


def compiled(log: Path) -> int:
    return sum(" -o " in line for line in log.read_text().splitlines())


@needs_compiler
@pytest.mark.usefixtures("short")
def test_they_are_compiled_once_and_only_their_owner_can_write_there(told: Path, cache_folder: Path) -> None:
    first, second = library(), library()
    assert first.handle is not None and second.handle is not None and first.about == "native"
    assert compiled(told) == 1
    (file,) = (cache_folder / "native").iterdir()
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700 and not file.stat().st_mode & 0o022


@needs_compiler
@pytest.mark.usefixtures("short")
def test_other_flags_or_sources_make_another_library(
    told: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library()
    monkeypatch.setattr(module, "FLAGS", (*module.FLAGS, "-DOTHER"))
    library()
    assert compiled(told) == 2 and len(list((cache_folder / "native").iterdir())) == 2


@needs_compiler
@pytest.mark.usefixtures("short")
def test_a_folder_in_which_others_can_write_is_not_trusted(
    told: Path, cache_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passing = tmp_path / "passing"
    passing.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(passing))
    folder = cache_folder / "native"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert library().handle is not None and library().handle is not None
    assert compiled(told) == 2 and not list(folder.iterdir()) and not list(passing.iterdir())


@needs_compiler
@pytest.mark.usefixtures("short")
def test_a_file_that_others_can_change_is_made_again(told: Path, cache_folder: Path) -> None:
    library()
    (file,) = (cache_folder / "native").iterdir()
    file.unlink()  # this process has it in its memory
    file.write_bytes(b"not a library")
    file.chmod(0o666)
    assert library().handle is not None
    assert compiled(told) == 2 and not file.stat().st_mode & 0o022


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names a feature of x86 processors")
def test_a_processor_without_such_products_has_the_other_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "cc -mno-avx512bf16")
    found = library()
    assert found.handle is not None and not found.tiles and not found.products
    assert found.handle.fedllm_norm and not hasattr(found.handle, "fedllm_low_rank")


@needs_compiler
@pytest.mark.usefixtures("short")
def test_a_mask_that_lets_others_write_does_not_compile_again(told: Path, cache_folder: Path) -> None:
    before = os.umask(0)
    try:
        library()
        library()
    finally:
        os.umask(before)
    assert compiled(told) == 1 and len(list((cache_folder / "native").iterdir())) == 1


def test_without_a_compiler_torch_computes_and_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    assert library().handle is None and not library().tiles
    assert library().about == "torch (no C compiler: none of cc, gcc and clang is on the PATH)"


@pytest.mark.parametrize("compiler", ["false", "/nowhere/cc", "sh -c 'echo error: no such flag >&2; exit 1'"])
def test_a_compiler_that_fails_is_named(compiler: str, cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", compiler)
    found = library()
    assert found.handle is None and found.about.startswith(f"torch ({compiler.split()[0]}")
    assert not list((cache_folder / "native").iterdir())
    if "flag" in compiler:
        assert "no such flag" in found.about


def test_native_demands_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLLM_KERNELS", "native")
    monkeypatch.setenv("CC", "/nowhere/cc")
    with pytest.raises(
        ModelError, match=r"FEDLLM_KERNELS is native, but there are no kernels: /nowhere/cc did .* install a C compiler"
    ):
        library()


def test_torch_compiles_nothing(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLLM_KERNELS", "torch")
    assert library().handle is None and not cache_folder.exists()


def test_an_unknown_choice_names_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLLM_KERNELS", "nativ")
    with pytest.raises(ConfigError, match=r"FEDLLM_KERNELS is 'nativ'.*native"):
        library()


@needs_compiler
def test_processes_that_begin_at_once_all_have_them(cache_folder: Path, short: Path) -> None:
    code = "import pathlib; from fedllm.models.kernels import build as module\n"
    code += f"module.HERE = pathlib.Path({str(short)!r}); print(module.library().about)"
    variables = {**os.environ, "FEDLLM_CACHE": str(cache_folder)}
    many = [
        subprocess.Popen([sys.executable, "-c", code], env=variables, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [process.communicate()[0].strip() for process in many] == ["native"] * 3
    assert len(list((cache_folder / "native").iterdir())) == 1
