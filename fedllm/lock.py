"""The lock of a run folder: one process at a time, and what the disk refuses in one sentence."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedllm.errors import RunError

REFUSED = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST})


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder if need be, and let no other process in. A process that dies lets go of it.

    Raises:
        RunError: another process is in it, or the disk is full or not writable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        finally:
            os.close(handle)
    except BlockingIOError as error:
        raise RunError(f"another process is running in {folder}; wait for it, or stop it") from error
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        raise RunError(
            f"{folder} could not be written ({error.strerror}); mend that, then go on with --resume"
        ) from error
