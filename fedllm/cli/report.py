"""`fedllm report`: a page from one run or several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedllm.report.page import write_report


def report_runs(folders: Sequence[Path], *, out: Path | None) -> None:
    """Write the page and say where."""
    print(f"written: {write_report(folders, out or folders[0] / 'report.html')}")
