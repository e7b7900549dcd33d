"""fedllm: fine-tune, align and pre-train language models across parties that may not pool their data.

import fedllm
run = fedllm.run(fedllm.load("my.yaml"), out="runs/x")

Where things are; the keys of an experiment file name their packages:

    task         models       base models, adapters (LoRA), layers, kernels, objectives, chat templates
    federation   data         who the clients are, what they hold, who takes part
    work         training     local training
    stages       stages       methods on the way down and up: FedProx, SCAFFOLD, server optimisers, compression, LoRA
    aggregator   aggregators  many updates to one
    evaluation   evaluation   scores, diagnostics of rounds
    the file     experiment   its record, names, methods, and `checks`: what does not go together is refused there
    --engine     engines      where clients run: serial, batched, Ray; the client's side of a round
    a run        runs         the server's side of a round, checkpoints, results
    messages, tensors         what crosses, as objects and as bytes; named tensors and their algebra
    report, cli               the page about a run; the command line
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
