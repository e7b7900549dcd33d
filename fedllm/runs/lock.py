"""The lock of a run folder: one process at a time, and one sentence where the disk refuses it."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedllm.errors import RunError, not_written
from fedllm.files import exclusive
from fedllm.runs.folder import ELSEWHERE, Folder

REFUSED = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST})


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder if need be, and let no other process in. A process that dies lets go of it.

    Raises:
        RunError: another process is in it, or the disk is full or not writable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder} cannot be made ({error.strerror}); {ELSEWHERE}") from error
    try:
        with exclusive(folder):
            yield
    except BlockingIOError as error:
        raise RunError(f"another process is running in {folder}; wait for it, or stop it") from error
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        begun = Folder(folder).started
        raise not_written(folder, error, "go on with --resume" if begun else "start again") from error
