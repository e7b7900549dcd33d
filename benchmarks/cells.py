"""Tables that take an hour: cells that are measured once, kept as lines of JSON, and shown as mean and spread."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from fedllm.errors import FedllmError

Row = dict[str, Any]
Cell = tuple[str, str, int]


def measure(
    path: Path, cells: Iterable[Cell], keys: Sequence[str], act: Callable[[Cell], Row], *, most: int | None, told: str
) -> tuple[list[Row], dict[str, str]]:
    """What `path` holds, and what is measured now of the cells that it lacks; and why some were left out.

    Args:
        keys: of a row, those that say which cell it is. most: cells in this call. told: of a row, for the progress.
    """
    found: list[Row] = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
    done, failed = {tuple(row[key] for key in keys) for row in found}, dict[str, str]()
    for cell in [cell for cell in cells if cell not in done][:most]:
        try:
            row = act(cell)
        except FedllmError as error:
            failed[", ".join(map(str, cell))] = str(error)
            print(f"{cell}: left out: {error}", file=sys.stderr, flush=True)
            continue
        found.append(row)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{cell}: {told.format(**row)}", file=sys.stderr, flush=True)
    return found, failed


def shown(values: Sequence[float | None], digits: int = 3) -> str:
    """Mean and standard deviation; a dash where nothing was measured."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = f"{statistics.fmean(known):.{digits}f}"
    return f"{mean} ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else mean
