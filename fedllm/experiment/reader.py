"""From a file's plain values to components and records, by the types that their fields declare.

A component is written `{name: {setting: value}}`, `{name: value}` (its first setting), or `name` alone.
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from fedllm.errors import ConfigError, nearest
from fedllm.experiment.catalog import NOUNS, PATHS


@dataclass(frozen=True)
class ConfigReader:
    """Reads values. `folder`: where the experiment's file lies, if it has one."""

    folder: Path | None = None

    def record(self, cls: type, value: Any, path: str) -> Any:
        """A frozen dataclass from a mapping of its fields.

        Raises:
            ConfigError: a key that is unknown or missing, or a value that does not fit; with the dotted key.
        """
        given, known = mapping(value, path), {item.name: item for item in fields(cls)}
        for key in given:
            if key not in known:
                raise unknown_key(dotted(path, key), key, known)
        for name, item in known.items():
            if name not in given and item.default is MISSING and item.default_factory is MISSING:
                raise ConfigError(f"'{dotted(path, name)}' is missing; set it")
        values = {key: self.value(hints(cls)[key], item, dotted(path, key)) for key, item in given.items()}
        return _made(cls, values, path)

    def value(self, hint: Any, value: Any, path: str) -> Any:
        """A value of the type that a field declares."""
        noun = component_type(hint)
        if noun is not None:
            return None if value is None and noun is not hint else self.component(noun, value, path)
        inner = get_args(hint)
        if get_origin(hint) is tuple and (inner[0] in NOUNS or is_dataclass(inner[0])):
            if not isinstance(value, list):
                raise ConfigError(f"{path} must be a list, not {value!r}")
            return tuple(self.value(inner[0], item, f"{path}[{place}]") for place, item in enumerate(value))
        record = record_of(hint)
        if record is not None:
            return None if value is None and record is not hint else self.record(record, value, path)
        if get_origin(hint) is Mapping and is_dataclass(inner[1]):
            return {
                str(key): self.value(inner[1], item, dotted(path, key)) for key, item in mapping(value, path).items()
            }
        if hint == tuple[str, ...] and isinstance(value, str):
            value = [value]
        if isinstance(value, str) and path in PATHS:
            value = self._found(value, path)
        return _typed(hint, value, path)

    def component(self, noun: type, value: Any, path: str) -> Any:
        """A component from `{name: settings}`, `{name: value}` or `name`."""
        name, given = named(value, path)
        cls = class_of(noun, name, path)
        return self.record(cls, settings_of(cls, given, f"{path}.{name}"), f"{path}.{name}")

    def _found(self, value: str, path: str) -> str:
        """A file or folder that is not below the working directory, but beside the experiment's file."""
        if self.folder is None or value in PATHS[path] or Path(value).expanduser().exists():
            return value
        beside = self.folder / value
        return str(beside) if beside.exists() else value


def named(value: Any, path: str) -> tuple[str, Any]:
    """A component's name, and what the file gives as its settings."""
    if isinstance(value, str):
        return value, None
    if not isinstance(value, Mapping) or len(value) != 1:
        raise ConfigError(f"{path} must be one name with its settings, not {value!r}")
    ((name, given),) = value.items()
    return str(name), given


def class_of(noun: type, name: str, path: str) -> type:
    """The class of a name of the catalog."""
    table = NOUNS[noun]
    if name in table:
        return table[name]
    kind = noun.__name__.lower()
    if ":" in name or "." in name:
        raise ConfigError(
            f"{path}: '{name}' names Python code, and a file may only name what fedllm itself has "
            f"({', '.join(table)}); run an experiment with your own {kind} from Python"
        )
    raise ConfigError(f"{path}: unknown {kind} '{name}'{nearest(name, table)}")


def settings_of(cls: type, given: Any, path: str) -> Mapping[str, Any]:
    """A component's settings as a mapping; a single value is its first setting."""
    if given is None:
        return {}
    if isinstance(given, Mapping):
        return given
    known = [item.name for item in fields(cls)]
    if not known:
        raise ConfigError(f"{path} takes no settings, but {given!r} is given")
    return {known[0]: given}


def component_type(hint: Any) -> type | None:
    """The noun of a field that holds one component, or one or none."""
    if hint in NOUNS:
        noun: type = hint
        return noun
    if get_origin(hint) in (Union, types.UnionType):
        return next((option for option in get_args(hint) if option in NOUNS), None)
    return None


def record_of(hint: Any) -> type | None:
    """The record of a field that holds one, or one or none."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else [hint]
    return next((option for option in options if isinstance(option, type) and is_dataclass(option)), None)


def mapping(value: Any, path: str) -> Mapping[str, Any]:
    """The value itself, if it is a mapping."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path or 'an experiment'} must be a mapping, not {value!r}")
    return value


def unknown_key(path: str, key: object, known: Iterable[str]) -> ConfigError:
    """The error for a key that does not exist."""
    return ConfigError(f"unknown key '{path}'{nearest(str(key), known)}")


def dotted(path: str, key: object) -> str:
    """A key below a place."""
    return f"{path}.{key}" if path else str(key)


@lru_cache(maxsize=256)
def hints(cls: type) -> Mapping[str, Any]:
    """The types of a class's fields."""
    return get_type_hints(cls)


@lru_cache(maxsize=256)
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint)


def _typed(hint: Any, value: Any, path: str) -> Any:
    """Strict: true is no number, and "4" is none either."""
    try:
        return _adapter(hint).validate_json(json.dumps(value), strict=True)
    except (TypeError, ValueError, RecursionError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise ConfigError(f"{path} is {value!r}: {reason[0].lower() + reason[1:]}") from error


def _made(cls: type, values: Mapping[str, Any], path: str) -> Any:
    """Make a record; one that names its setting without its place is given the place."""
    try:
        return cls(**values)
    except ConfigError as error:
        message = str(error)
        for owner in (path.rpartition(".")[2], cls.__name__.lower()):
            if path != owner and message.startswith(f"{owner}."):
                raise ConfigError(f"{path}{message.removeprefix(owner)}") from error
        raise
