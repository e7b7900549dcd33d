"""`fedllm check`: what an experiment would do, without loading a model."""

from __future__ import annotations

from collections.abc import Sequence

from fedllm.experiment.config_file import find, load
from fedllm.runs.preview import preview


def check_file(file: str, overrides: Sequence[str]) -> None:
    """Check the settings and the data; print the plan."""
    for name, text in preview(load(file, overrides), find(file)):
        print(f"{name:11} {text}")
    print("ok")
