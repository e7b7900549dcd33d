"""fedllm: fine-tune, align and pre-train language models across parties that may not pool their data.

import fedllm
run = fedllm.run(fedllm.load("my.yaml"), out="runs/x")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedllm.version import __version__ as __version__

if TYPE_CHECKING:
    from fedllm.experiment.config_file import build, dump, load
    from fedllm.experiment.record import Experiment
    from fedllm.runs.launch import Result, run
    from fedllm.training.per_example_gradients import per_example_gradients

__all__ = ["Experiment", "Result", "build", "dump", "load", "per_example_gradients", "run"]

_PLACES = {
    "build": "fedllm.experiment.config_file",
    "dump": "fedllm.experiment.config_file",
    "load": "fedllm.experiment.config_file",
    "Experiment": "fedllm.experiment.record",
    "Result": "fedllm.runs.launch",
    "run": "fedllm.runs.launch",
    "per_example_gradients": "fedllm.training.per_example_gradients",
}


def __getattr__(name: str) -> Any:
    """Import the public names at first use: `fedllm --help` needs no torch."""
    if name not in _PLACES:
        raise AttributeError(f"module 'fedllm' has no attribute '{name}'")
    from importlib import import_module

    return vars(import_module(_PLACES[name]))[name]
