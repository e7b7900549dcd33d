"""The journal of a private run's releases, `privacy.jsonl`: a line is on the disk before its noise is drawn.

A line holds the round, a mark that tells this release from another one of the round, the stage or the work, and the
releases, each with its clients where these add the noise. The journal only grows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedllm.errors import PrivacyError, RunError, not_written
from fedllm.files import sync
from fedllm.privacy.releases import release_from_json

FILE = "privacy.jsonl"
Record = Mapping[str, Any]


def append(folder: Path, record: Record) -> None:
    """Write a line, and wait until the disk has it.

    Raises:
        RunError: the disk is full or not writable.
    """
    path = folder / FILE
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, sort_keys=True) + "\n")
            file.flush()
            os.fsync(file.fileno())
        sync(folder)
    except OSError as error:
        raise not_written(path, error, "resume the run") from error


def read(folder: Path) -> list[Record]:
    """The whole lines of a run's journal. One that was cut off released nothing, and is taken away.

    Raises:
        RunError: a line in the middle is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        os.truncate(path, len(whole))
    found = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            record = json.loads(line)
            _, _, found_releases = record["round"], record["mark"], record["releases"]
            for release in found_releases:
                release_from_json({name: value for name, value in release.items() if name != "clients"})
            found.append(record)
        except (ValueError, LookupError, TypeError, AttributeError, PrivacyError) as error:
            raise RunError(
                f"{path}, line {number} is damaged, so nobody knows what was spent; bring the file back from a copy"
            ) from error
    return found
