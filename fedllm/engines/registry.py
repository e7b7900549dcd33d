"""The engines by name, and which of them runs an experiment.

An engine is no part of an experiment: it changes speed, never results. So it is named here and not in the catalog.
"""

from __future__ import annotations

from fedllm.engines.base import Engine
from fedllm.engines.batched.engine import Batched
from fedllm.engines.remote.ray import Ray
from fedllm.engines.remote.sites import Sites
from fedllm.engines.serial import Serial
from fedllm.errors import CheckError, ConfigError, nearest
from fedllm.experiment.reader import ConfigReader, named, settings_of
from fedllm.experiment.record import Experiment
from fedllm.experiment.yaml import read_yaml
from fedllm.models.loaded_model import LoadedModel

ENGINES: dict[str, type[Engine]] = {"serial": Serial, "batched": Batched, "ray": Ray, "sites": Sites}


def choose(engine: Engine | None, experiment: Experiment, model: LoadedModel) -> tuple[Engine, str]:
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
    return model.why_not_stackable


def engine_of(engine: str | Engine) -> Engine | None:
    """An engine from its name, or from its name with settings (`{batched: {stack: 8}}`); None for "auto".

    Raises:
        ConfigError: an unknown name or setting.
    """
    if not isinstance(engine, str):
        return engine
    if engine == "auto":
        return None
    name, given = named(read_yaml(engine), "engine")
    if name not in ENGINES:
        raise ConfigError(f"unknown engine '{name}'{nearest(name, ['auto', *ENGINES])}")
    cls = ENGINES[name]
    made: Engine = ConfigReader().record(cls, settings_of(cls, given, f"engine.{name}"), f"engine.{name}")
    return made


def engine_name(engine: Engine) -> str:
    """An engine's name in the table; of one from elsewhere, its class's name in lower case."""
    cls = type(engine)
    return next((name for name, known in ENGINES.items() if known is cls), cls.__name__.lower())
