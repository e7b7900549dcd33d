"""Compiles the kernels once for a machine and a compiler, and loads them.

    CACHE/native/HASH.so     HASH: of the sources, the command, and what the compiler says of itself and the processor

The folder is its owner's alone: where another user could write, the kernels are compiled for this process only.
`FEDLLM_KERNELS` chooses: `auto` (the kernels if they can be had), `native` (an error if not), `torch` (never).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from fedllm.errors import ConfigError, ModelError, nearest
from fedllm.files import cache_dir

VARIABLE, CHOICES = "FEDLLM_KERNELS", ("auto", "native", "torch")
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-fPIC", "-shared", "-pthread", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math")
OWN = {  # for this processor
    "x86_64": ("-march=native", "-mprefer-vector-width=512"),
    "aarch64": ("-mcpu=native",),
    "arm64": ("-mcpu=native",),
}
SECONDS = 120  # for the compiler
HERE = Path(__file__).parent


@dataclass(frozen=True, eq=False)
class Library:
    """The kernels, or None and the reason."""

    handle: ctypes.CDLL | None
    reason: str = ""

    @property
    def about(self) -> str:
        """What computes, and why."""
        return "native" if self.handle is not None else f"torch ({self.reason})"

    @cached_property
    def tiles(self) -> bool:
        """Whether it has the products, too, which the processor must be made for."""
        return self.handle is not None and bool(self.handle.fedllm_has_tiles())

    @cached_property
    def products(self) -> bool:
        """Whether its products with frozen matrices are faster than PyTorch's."""
        return self.handle is not None and bool(self.handle.fedllm_has_products())

    @cached_property
    def floats(self) -> bool:
        """Whether it has them all in float32, which the processor's vectors must be wide enough for."""
        return self.handle is not None and bool(self.handle.fedllm_has_floats())


@lru_cache(maxsize=1)
def library() -> Library:
    """The kernels of this process, found at its first call.

    Raises:
        ConfigError: FEDLLM_KERNELS is no choice.
        ModelError: it asks for kernels that cannot be had.
    """
    choice = os.environ.get(VARIABLE, "auto")
    if choice not in CHOICES:
        raise ConfigError(f"{VARIABLE} is '{choice}'{nearest(choice, CHOICES)}")
    if choice == "torch":
        return Library(None, f"{VARIABLE} says so")
    found = _found()
    if found.handle is None and choice == "native":
        raise ModelError(
            f"{VARIABLE} is native, but there are no kernels: {found.reason}; install a C compiler, or set it to auto"
        )
    return found


def _found() -> Library:
    """Compiled now or before."""
    compiler = _compiler()
    if compiler is None:
        return Library(None, "no C compiler: none of cc, gcc and clang is on the PATH")
    command = [*compiler, *FLAGS, *OWN.get(platform.machine(), ())]
    try:
        with _folder() as folder:
            handle = ctypes.CDLL(str(_compiled(command, folder)))
    except (OSError, subprocess.SubprocessError) as error:
        return Library(None, f"{shlex.join(compiler)} did not compile them: {_reason(error)}")
    return Library(handle)


def _compiler() -> list[str] | None:
    """$CC, or the first that is there."""
    if chosen := os.environ.get("CC"):
        return shlex.split(chosen)
    return next(([path] for name in COMPILERS if (path := shutil.which(name))), None)


def _compiled(command: list[str], folder: Path) -> Path:
    """The library's file in a folder."""
    sources = sorted(HERE.glob("*.[ch]"))
    about, digest = _run([*command, "-dM", "-E", "-x", "c", os.devnull]), hashlib.sha256()
    for part in (repr(command).encode(), about, *map(Path.read_bytes, sources)):
        digest.update(hashlib.sha256(part).digest())
    file = folder / f"{digest.hexdigest()[:32]}.so"
    if not (file.is_file() and _is_own(file)):
        with tempfile.TemporaryDirectory(dir=folder) as place:  # the folder is its owner's alone, too
            made = Path(place, file.name)
            _run([*command, "-o", str(made), *(str(path) for path in sources if path.suffix == ".c"), "-lm"])
            made.chmod(0o700)  # whatever the umask
            os.replace(made, file)  # whole or not at all
    return file


@contextmanager
def _folder() -> Iterator[Path]:
    """Where they are kept; one that goes away again where that cannot be written, or by others, too."""
    folder = cache_dir() / "native"
    with suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.is_dir() and _is_own(folder) and os.access(folder, os.W_OK):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="fedllm-native-") as passing:
        yield Path(passing)


def _is_own(path: Path) -> bool:
    """Nobody else can have written here."""
    if not hasattr(os, "getuid"):  # Windows, where a user's folders are that user's
        return True
    state = path.stat()
    return state.st_uid == os.getuid() and not state.st_mode & 0o022


def _run(command: list[str]) -> bytes:
    return subprocess.run(command, check=True, capture_output=True, timeout=SECONDS).stdout


def _reason(error: OSError | subprocess.SubprocessError) -> str:
    """The line that says it."""
    said = (getattr(error, "stderr", None) or b"").decode(errors="replace") or str(error)
    lines = said.strip().splitlines() or [type(error).__name__]
    return next((line for line in lines if "error" in line.lower()), lines[0]).strip()
