"""`fedllm personalise`: a newcomer's own model from a finished run."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from fedllm.errors import counted
from fedllm.report.formatting import figure
from fedllm.runs.personalise import Newcomer, fields_of, personalise


def personalise_run(
    folder: Path,
    *,
    data: str,
    name: str,
    fields: Sequence[str],
    steps: int | None,
    lr: float | None,
    heldout: float | None,
) -> None:
    """Train, say what it came to, and how to talk to it."""
    made = personalise(folder, Newcomer(name, data, fields_of(fields), steps, lr, heldout))
    trained = f"{counted(made.tensors, 'tensor')} on {counted(made.trained, 'record')}"
    print(f"trained {trained}; the shared part is as it was")
    for metric, after in made.after.items():
        before = figure(made.before.get(metric))
        print(f"{metric} on {counted(made.heldout, 'held-out record')}: {before} before, {figure(after)} after")
    print(f"written: {made.folder}")
    print(f"Chat with it:  fedllm chat {shlex.quote(str(folder))} --client {shlex.quote(name)}")
