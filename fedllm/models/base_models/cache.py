"""Models in the cache folder: what is downloaded or converted once, and used by every later run.

    CACHE/models/NAME/             complete, always: it appears by one rename
    CACHE/models/.NAME.lock        held while NAME is prepared; other processes wait for it
    CACHE/models/.NAME.partial/    what is being prepared; a start that finds one left over throws it away

A reader of NAME needs no lock, and nothing here is ever changed in place.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from fedllm.errors import ModelError
from fedllm.files import cache_dir, sync

Advance = Callable[[int], None]
Build = Callable[[Path, Path], None]


def build_once(name: str, build: Build, *, needs: int = 0) -> Path:
    """The folder CACHE/models/NAME, made by `build(out, work)` if it is not there.

    `build` fills the empty folder `out`; what it puts into `work` is thrown away. Whatever ends it early, an error or
    a kill, NAME does not appear. Two processes that ask at once build once. `needs`: free bytes asked for beforehand.

    Raises ModelError: no space, no right to write, or whatever `build` ran into.
    """
    models = cache_dir() / "models"
    folder = models / name
    if folder.is_dir():
        return folder
    try:
        models.mkdir(parents=True, exist_ok=True)
        with _lock(models / f".{name}.lock", name):
            if not folder.is_dir():
                _refuse_if_full(models, needs)
                _build(folder, build)
    except ModelError:
        raise
    except Exception as error:  # the readers and writers of other packages raise what they please
        raise ModelError(_reason(name, models, error)) from error
    return folder


@contextmanager
def progress(text: str, total: int | None = None) -> Iterator[Advance]:
    """Say on stderr what takes its time: a bar on a terminal, one line elsewhere.

    Yields a function that takes what is done so far, out of `total` bytes. Without a total only the time runs.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(file=sys.stderr)  # bound now: conversions silence sys.stderr
    if not console.is_terminal:
        size = f" ({total / 1e6:.0f} MB)" if total else ""
        console.print(f"{text}{size} ...", markup=False, highlight=False, soft_wrap=True)
        yield lambda done: None
        return
    size_column = [DownloadColumn()] if total else []
    columns = TextColumn("{task.description}", markup=False), BarColumn(), *size_column, TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(text, total=total)
        yield lambda done: bar.update(task, completed=done)


def _build(folder: Path, build: Build) -> None:
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        out, work = partial / "out", partial / "work"
        out.mkdir(parents=True)
        work.mkdir()
        build(out, work)
        for path in (*out.rglob("*"), out):
            sync(path)
        os.replace(out, folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _lock(path: Path, name: str) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        with progress(f"waiting for another process that prepares {name}"):
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _refuse_if_full(folder: Path, needs: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needs:
        raise ModelError(
            f"{folder} has {free / 1e6:.0f} MB left and {needs / 1e6:.0f} MB are needed; free some space or set "
            "FEDLLM_CACHE to a folder on another disk"
        )


def _reason(name: str, models: Path, error: Exception) -> str:
    code = error.errno if isinstance(error, OSError) else None
    if code in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error):  # the text: from Rust's writer
        return f"no space left for {name} in {models}; free some space or set FEDLLM_CACHE to a folder on another disk"
    if isinstance(error, PermissionError) or code in (errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        return f"{models} cannot be written to; set FEDLLM_CACHE to a folder of your own"
    first_line = (str(error).strip().splitlines() or [""])[0]
    return f"{name} could not be prepared: {type(error).__name__}: {first_line}"
