"""fedllm: fine-tune, align and pre-train language models across parties that may not pool their data.

import fedllm
run = fedllm.run(fedllm.load("my.yaml"), out="runs/x")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fedllm.config import build, dump, load
    from fedllm.experiment import Experiment
    from fedllm.launch import Result, run
    from fedllm.works.per_example import per_example_gradients

__all__ = ["Experiment", "Result", "build", "dump", "load", "per_example_gradients", "run"]

_PLACES = {
    "build": "fedllm.config",
    "dump": "fedllm.config",
    "load": "fedllm.config",
    "Experiment": "fedllm.experiment",
    "Result": "fedllm.launch",
    "run": "fedllm.launch",
    "per_example_gradients": "fedllm.works.per_example",
}


def __getattr__(name: str) -> Any:
    """Import the public names at first use: `fedllm --help` needs no torch."""
    if name not in _PLACES:
        raise AttributeError(f"module 'fedllm' has no attribute '{name}'")
    from importlib import import_module

    return vars(import_module(_PLACES[name]))[name]
