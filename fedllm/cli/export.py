"""`fedllm export`: a run as files that other programs load."""

from __future__ import annotations

from pathlib import Path

from fedllm.runs.export import export


def export_run(folder: Path, *, to: str, out: Path | None, client: str | None) -> None:
    """Write the model and say where."""
    print(f"written: {export(folder, to, out=out, client=client)}")
