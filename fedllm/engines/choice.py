"""Which engine runs an experiment, and why."""

from __future__ import annotations

from fedllm.engine import Engine
from fedllm.engines.batched import Batched
from fedllm.engines.serial import Serial
from fedllm.errors import CheckError
from fedllm.experiment import Experiment
from fedllm.tasks.model import LoadedModel


def chosen(engine: Engine | None, experiment: Experiment, model: LoadedModel) -> tuple[Engine, str]:
    """An engine that can run the experiment, and the reason. None: batched where it can be, else serial.

    Raises:
        CheckError: an engine that stacks clients was asked for, and they cannot be stacked.
    """
    obstacle = _obstacle(experiment, model)
    if engine is None:
        return (Batched(), "its clients can be stacked") if obstacle is None else (Serial(), obstacle)
    if engine.stacks and obstacle is not None:
        raise CheckError(f"engine {type(engine).__name__.lower()}: {obstacle}; use --engine serial, or auto")
    return engine, "it was asked for"


def _obstacle(experiment: Experiment, model: LoadedModel) -> str | None:
    if not experiment.work.batchable:
        return f"the work {type(experiment.work).__name__} trains one client at a time"
    return model.unstackable
