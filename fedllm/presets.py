"""Presets: a method's name to what it sets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from fedllm.errors import ConfigError, nearest
from fedllm.stage import Stage

if TYPE_CHECKING:
    from fedllm.catalog import Method, Table


def expand(spec: Mapping[str, Any], methods: Mapping[str, Method], nouns: Mapping[type, Table]) -> dict[str, Any]:
    """Replace `method` by what it sets. `method: {fedprox: {mu: 0.1}}` passes a setting to the stage that has it.

    Raises:
        ConfigError: unknown method or setting, or the file sets differently what the method sets.
    """
    name, settings = _named(spec["method"])
    if name not in methods:
        raise ConfigError(f"unknown method '{name}'{nearest(name, methods)}")
    method = methods[name]
    stages = _configured(name, method, settings, nouns[Stage])
    for key, value in (("stages", stages), ("aggregator", method.aggregator)):
        if key in spec and spec[key] != value:
            raise ConfigError(
                f"method {name} sets {key} to {value}, but the file sets {spec[key]}; leave out one of the two"
            )
    expanded = {**spec, "stages": stages, "aggregator": method.aggregator}
    del expanded["method"]
    if method.adapter is not None:
        expanded["task"] = _with_adapter(name, method.adapter, spec.get("task", {}))
    return expanded


def _named(value: Any) -> tuple[str, Mapping[str, Any]]:
    if isinstance(value, str):
        return value, {}
    if isinstance(value, Mapping) and len(value) == 1:
        ((name, settings),) = value.items()
        if settings is None or isinstance(settings, Mapping):
            return str(name), settings or {}
    raise ConfigError(f"method must be a name, or one name with its settings, not {value!r}")


def _configured(name: str, method: Method, settings: Mapping[str, Any], table: Table) -> list[dict[str, Any]]:
    stages: list[dict[str, Any]] = []
    for entry in method.stages:
        stage, given = (entry, {}) if isinstance(entry, str) else next(iter(entry.items()))
        stages.append({stage: dict(given)})
    for key, value in settings.items():
        owners = [stage for stage in stages for cls in [table[next(iter(stage))]] if key in _fields(cls)]
        if not owners:
            known = [field for stage in stages for field in _fields(table[next(iter(stage))])]
            raise ConfigError(f"method {name} has no setting '{key}'{nearest(key, known)}")
        next(iter(owners[0].values()))[key] = value
    return stages


def _with_adapter(name: str, kind: str, task: Any) -> Any:
    if not isinstance(task, Mapping):
        return task
    given = task.get("adapter", kind)
    found = given if isinstance(given, str) else next(iter(given), None)
    if found != kind:
        raise ConfigError(
            f"method {name} needs the adapter {kind}, but the file sets task.adapter to {found}; "
            "leave out one of the two"
        )
    return {**task, "adapter": given}


def _fields(cls: type) -> list[str]:
    return [item.name for item in fields(cls)]
