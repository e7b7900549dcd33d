"""Engine names, and what `auto` chooses."""

from __future__ import annotations

from collections.abc import Mapping

from fedllm.engine import Engine
from fedllm.engines.serial import Serial
from fedllm.errors import ConfigError, nearest
from fedllm.experiment import Experiment

ENGINES: Mapping[str, type[Engine]] = {"serial": Serial}


def engine_of(engine: str | Engine, experiment: Experiment) -> tuple[Engine, str]:
    """An engine and its name.

    Raises:
        ConfigError: unknown name.
    """
    if not isinstance(engine, str):
        return engine, type(engine).__name__.lower()
    if engine == "auto":
        engine = "serial"
    if engine not in ENGINES:
        raise ConfigError(f"unknown engine '{engine}'{nearest(engine, [*ENGINES, 'auto'])}")
    return ENGINES[engine](), engine
