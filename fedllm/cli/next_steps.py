"""What to do after a run, as far as it suits the run."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedllm.experiment.catalog import TABLES
from fedllm.experiment.record import Experiment


def next_steps(experiment: Experiment, summary: Mapping[str, Any], folder: Path) -> Iterator[str]:
    """A line for each: talk to the model if it was trained; use other data if these are fedllm's own."""
    if summary.get("tokens_trained"):
        yield f"Chat with the tuned model:  fedllm chat {shlex.quote(str(folder))} --compare"
    if getattr(experiment.federation, "data", None) in (None, *TABLES["data"]):
        yield "Run on your own data:       fedllm init own-data"
