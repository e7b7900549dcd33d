"""Presets: a method's name to what it sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from fedllm.errors import ConfigError, nearest
from fedllm.stages.base import Stage

if TYPE_CHECKING:
    from fedllm.experiment.catalog import Table
    from fedllm.experiment.methods import Method

# Aggregators that a method that adds up goes with, and the stages that they need.
SECURE: Mapping[str, tuple[str, ...]] = {
    "secure_sum": ("fixed_point",),
    "bucketed": ("fixed_point",),
    "homomorphic_sum": (),
}
PROPER = 0.82  # secure_fedavg and fedmedian are other methods, fedprx is a misspelt one
Same = Callable[[str, Any, Any], bool]  # (key of an experiment, one value, another): do they mean the same


def expand(
    spec: Mapping[str, Any], methods: Mapping[str, Method], nouns: Mapping[type, Table], same: Same
) -> tuple[dict[str, Any], str]:
    """Replace `method` by what it sets; and the method's name.

    `method: {fedprox: {mu: 0.1}}` passes a setting to the stage that has it. What the method sets may stand in the file
    too, if it means the same.

    Raises:
        ConfigError: unknown method or setting, or the file sets differently what the method sets.
    """
    name, settings = _named(spec["method"])
    if name not in methods:
        raise ConfigError(f"unknown method '{name}'{nearest(name, methods, PROPER)}")
    method = _under(methods[name], spec.get("aggregator"))
    _require_work(name, method, spec.get("work"))
    sets = {"stages": _configured(name, method, settings, nouns[Stage]), "aggregator": method.aggregator}
    for key, value in sets.items():
        if key in spec and not same(key, spec[key], value):
            raise ConfigError(
                f"method {name} sets {key} to {value}, but the file sets it to {spec[key]}; leave out one of the two"
            )
    expanded = {**spec, **sets}
    del expanded["method"]
    if method.adapter is not None:
        expanded["task"] = _with_adapter(name, method, spec.get("task", {}))
    if method.scope:
        expanded["task"] = _with_scope(name, method.scope, expanded.get("task", {}))
    return expanded, name


def _under(method: Method, aggregator: Any) -> Method:
    """A method that adds up, with the aggregator of the file and the stages that this one needs."""
    kind = str(next(iter(aggregator), "") if isinstance(aggregator, Mapping) else aggregator)
    if kind not in SECURE or method.aggregator != "sum":
        return method
    known = set(map(_stage_name, method.stages))
    extra = (stage for stage in SECURE[kind] if stage not in known)
    return replace(method, aggregator=aggregator, stages=(*method.stages, *extra))


def _require_work(name: str, method: Method, work: Any) -> None:
    """A method does not set the work, whose rate and steps are the file's; it may need one of a kind."""
    found = next(iter(work), "nothing") if isinstance(work, Mapping) else work
    if method.work is not None and found is not None and found != method.work:
        raise ConfigError(
            f"method {name} needs the work {method.work}, but the file sets work to {found}; set work: "
            f"{{{method.work}: {{...}}}}, whose learning rate is another one"
        )


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
    known = passed_on(method, table)
    for key, value in settings.items():
        if key not in known:
            raise ConfigError(f"method {name} has no setting '{key}'{nearest(str(key), known)}")
        stages[known[key]][_stage_name(method.stages[known[key]])][key] = value
    return stages


def passed_on(method: Method, table: Table) -> dict[str, int]:
    """The settings that a method passes on, each with the place of the first of its stages that has it."""
    places: dict[str, int] = {}
    for place, entry in enumerate(method.stages):
        for item in fields(table[_stage_name(entry)]):
            places.setdefault(item.name, place)
    return places


def _stage_name(entry: Mapping[str, Any] | str) -> str:
    return entry if isinstance(entry, str) else next(iter(entry))


def _with_adapter(name: str, method: Method, task: Any) -> Any:
    """The task with the adapter that the method needs, of the file's own settings if it has any."""
    if not isinstance(task, Mapping):
        return task
    kind = str(method.adapter)
    given = task.get("adapter", kind)
    found = next(iter(given)) if isinstance(given, Mapping) and given else given
    if found != kind:
        raise ConfigError(
            f"method {name} needs the adapter {kind}, but the file sets task.adapter to {found}; "
            "leave out one of the two"
        )
    return {**task, "adapter": _with_settings(name, kind, given, method.adapter_sets)}


def _with_settings(name: str, kind: str, given: Any, sets: Mapping[str, Any]) -> Any:
    """The adapter with what the method sets of it."""
    if not sets:
        return given
    settings = given[kind] if isinstance(given, Mapping) else None
    if settings is not None and not isinstance(settings, Mapping):  # its first setting alone
        raise ConfigError(f"method {name} sets task.adapter.{kind}.{next(iter(sets))}; give {kind} as a mapping")
    for key, value in sets.items():
        if settings and settings.get(key, value) != value:
            raise ConfigError(
                f"method {name} sets task.adapter.{kind}.{key} to {value}, but the file sets it to {settings[key]}; "
                "leave out one of the two"
            )
    return {kind: {**(settings or {}), **sets}}


def _with_scope(name: str, sets: Mapping[str, Sequence[str]], task: Any) -> Any:
    """The task with what the method sets of its scope."""
    if not isinstance(task, Mapping):
        return task
    given = task.get("scope") or {}
    if not isinstance(given, Mapping):
        return task
    for key, patterns in sets.items():
        found = given.get(key, patterns)
        if ([found] if isinstance(found, str) else list(found)) != list(patterns):
            raise ConfigError(
                f"method {name} sets task.scope.{key} to {list(patterns)}, but the file sets it to {found}; "
                "leave out one of the two"
            )
    return {**task, "scope": {**given, **{key: list(patterns) for key, patterns in sets.items()}}}
