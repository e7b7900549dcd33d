"""Overrides: `dotted.key=value` on a file's plain values, before they are read.

work.sgd.lr=1e-4                     a setting; other settings of the same component stay
task.adapter=full                    another component, with its defaults
task.adapter.soft_prompt.tokens=8    another component, with this setting
stages.0.prox.mu=0.1                 a component of a list, by its place
evaluation.compare=[]                a list
method=full                          another method, with the adapter that it needs in place of the file's
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_origin

from fedllm.errors import ConfigError, nearest
from fedllm.experiment.catalog import NOUNS
from fedllm.experiment.methods import METHODS
from fedllm.experiment.presets import PROPER
from fedllm.experiment.reader import (
    class_of,
    component_type,
    dotted,
    hints,
    mapping,
    named,
    record_of,
    settings_of,
    unknown_key,
)
from fedllm.experiment.record import Experiment
from fedllm.experiment.yaml import read_yaml


def all_overridden(spec: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The plain values with several of them changed, in order.

    Raises:
        ConfigError: as `overridden`.
    """
    changed = dict(spec)
    for override in overrides:
        changed = overridden(changed, override)
    keys = [override.partition("=")[0] for override in overrides]
    if any(key.split(".")[0] == "method" for key in keys) and not any(_sets_adapter(key) for key in keys):
        return _with_own_adapter(changed)
    return changed


def _sets_adapter(key: str) -> bool:
    return key == "task" or key.split(".")[:2] == ["task", "adapter"]


def _with_own_adapter(spec: dict[str, Any]) -> dict[str, Any]:
    """Without an adapter of another kind than the method needs."""
    task, method = spec.get("task"), spec["method"]
    name = next(iter(method)) if isinstance(method, Mapping) and method else method
    wanted = METHODS[name].adapter if isinstance(name, str) and name in METHODS else None
    given = task.get("adapter") if isinstance(task, Mapping) else None
    kind = next(iter(given)) if isinstance(given, Mapping) and given else given
    if not isinstance(task, Mapping) or wanted is None or kind in (None, wanted):
        return spec
    return {**spec, "task": {key: value for key, value in task.items() if key != "adapter"}}


def overridden(spec: Mapping[str, Any], override: str) -> dict[str, Any]:
    """The plain values with one of them changed; the given ones are left alone.

    Raises:
        ConfigError: not of this form, or there is no such key.
    """
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"'{override}' is not of the form dotted.key=value")
    value = _read(text, override)
    head, *rest = key.split(".")
    if head == "method":
        return {**spec, head: _in_method(spec.get(head), rest, value)}
    return {**spec, **_in_record(Experiment, spec, key.split("."), value, "")}


def _read(text: str, override: str) -> Any:
    """A value of the command line: YAML, and patterns such as *lora_B and !*lora_B without quotes."""
    if text.startswith(("*", "!", "&")):
        return text
    try:
        return read_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"the value of '{override}' cannot be read: {error}") from error


def _set(hint: Any, old: Any, steps: list[str], value: Any, path: str) -> Any:
    """`old`, of the type `hint`, with the value at the end of `steps`."""
    if not steps:
        return value
    noun, inner = component_type(hint), get_args(hint)
    if noun is not None:
        return _in_component(noun, old, steps, value, path)
    if get_origin(hint) is tuple and (inner[0] in NOUNS or is_dataclass(inner[0])):
        place, rest = _place(old, steps, path), steps[1:]
        changed = _set(inner[0], old[place], rest, value, f"{path}.{place}")
        return [*old[:place], changed, *old[place + 1 :]]
    record = record_of(hint)
    if record is not None:
        return _in_record(record, {} if old is None else mapping(old, path), steps, value, path)
    if get_origin(hint) is Mapping and is_dataclass(inner[1]) and len(steps) > 1:
        name, entries = ".".join(steps[:-1]), {} if old is None else mapping(old, path)
        return {**entries, name: _set(inner[1], entries.get(name), steps[-1:], value, dotted(path, name))}
    if get_origin(hint) is Mapping:
        return {**(old or {}), ".".join(steps): value}
    raise ConfigError(f"unknown key '{dotted(path, '.'.join(steps))}': {path} is one value")


def _in_record(cls: type, old: Mapping[str, Any], steps: list[str], value: Any, path: str) -> dict[str, Any]:
    key, *rest = steps
    known = [item.name for item in fields(cls)]
    if key not in known:
        raise unknown_key(dotted(path, key), key, known)
    return {**old, key: _set(hints(cls)[key], old.get(key), rest, value, dotted(path, key))}


def _in_component(noun: type, old: Any, steps: list[str], value: Any, path: str) -> dict[str, Any]:
    name, *rest = steps
    cls = class_of(noun, name, path)
    if not rest:
        return {name: value}
    before, given = (None, None) if old is None else named(old, path)
    settings = settings_of(cls, given, f"{path}.{name}") if before == name else {}
    return {name: _in_record(cls, settings, rest, value, f"{path}.{name}")}


def _in_method(old: Any, steps: list[str], value: Any) -> Any:
    if not steps:
        return value
    name, *rest = steps
    if name not in METHODS:
        raise ConfigError(f"unknown method '{name}'{nearest(name, METHODS, PROPER)}")
    if not rest:
        return {name: value}
    before, given = (None, None) if old is None else named(old, "method")
    settings = mapping({} if given is None else given, f"method.{name}") if before == name else {}
    return {name: {**settings, ".".join(rest): value}}


def _place(old: Any, steps: list[str], path: str) -> int:
    if not isinstance(old, list):
        raise ConfigError(f"'{path}.{steps[0]}' cannot be set: the file gives no list '{path}'")
    if not steps[0].isdecimal() or int(steps[0]) >= len(old):
        raise ConfigError(f"'{path}.{steps[0]}' is no place in the list '{path}', which has 0 to {len(old) - 1}")
    return int(steps[0])
