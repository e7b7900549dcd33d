"""Experiment files: YAML to `Experiment` and back. Unknown keys and names are errors that name the nearest match.

A component is written `{name: {setting: value}}`, `{name: value}` (its first setting), or `name` alone.
"""

from __future__ import annotations

import hashlib
import json
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from fedllm.catalog import METHODS, NOUNS, name_of
from fedllm.errors import ConfigError, FedllmError, nearest
from fedllm.experiment import Experiment
from fedllm.presets import expand

ABOUT = "about"  # what a resolved file says of itself; not part of the experiment


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-3 as a number and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"line {node.start_mark.line + 1}: the key '{key}' is given twice")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def load(file: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """An experiment from a file, or from a packaged recipe's name, with `dotted.key=value` overrides.

    Raises:
        ConfigError: names the file, the key and what to do.
    """
    path = find(file)
    try:
        spec = parse(path.read_text(encoding="utf-8"))
        for override in overrides:
            _override(spec, override)
        return build(spec, folder=path.parent)
    except FedllmError as error:
        raise type(error)(f"{path.name}: {error}") from error


def find(file: str | Path) -> Path:
    """The file itself, or a packaged recipe."""
    path, recipes = Path(file), Path(__file__).parent / "recipes"
    if path.is_file():
        return path
    if (recipes / f"{file}.yaml").is_file():
        return recipes / f"{file}.yaml"
    around = path.parent.glob("*.y*ml") if path.parent.is_dir() else ()
    known = [*(recipe.stem for recipe in recipes.glob("*.yaml")), *(str(found) for found in around)]
    raise ConfigError(f"there is no file or packaged recipe '{file}'{nearest(str(file), known)}")


def parse(text: str) -> dict[str, Any]:
    """YAML to a mapping."""
    try:
        spec = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"it is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(spec, dict):
        raise ConfigError("an experiment is a mapping with the keys task, federation, work, method, rounds")
    return spec


def build(spec: Mapping[str, Any], *, folder: Path | None = None) -> Experiment:
    """An experiment from a mapping. Relative data files are looked for beside the experiment's file, too."""
    spec = {key: value for key, value in spec.items() if key != ABOUT}
    if "method" in spec:
        spec = expand(spec, METHODS, NOUNS)
    elif "stages" not in spec:
        raise ConfigError("an experiment needs 'method' (see: fedllm ls methods) or 'stages'")
    experiment: Experiment = _record(Experiment, spec, "")
    return experiment


def override(experiment: Experiment, overrides: Sequence[str]) -> Experiment:
    """An experiment with some settings changed."""
    spec = dump(experiment)
    for change in overrides:
        _override(spec, change)
    return build(spec)


def dump(experiment: Experiment) -> dict[str, Any]:
    """The experiment as a mapping with every default written out; `build` turns it back into an equal one."""
    plain: dict[str, Any] = _plain(experiment)
    return plain


def experiment_hash(experiment: Experiment) -> str:
    """SHA-256 of the resolved experiment: the run's identity."""
    return hashlib.sha256(json.dumps(dump(experiment), sort_keys=True).encode()).hexdigest()


def difference(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> list[str]:
    """The keys in which two resolved experiments differ, with both values."""
    found: list[str] = []
    for key in [*old, *(key for key in new if key not in old)]:
        one, two = old.get(key), new.get(key)
        if isinstance(one, Mapping) and isinstance(two, Mapping):
            found += difference(one, two, f"{path}{key}.")
        elif one != two:
            found.append(f"{path}{key}: {one!r} there, {two!r} here")
    return found


def schema() -> dict[str, Any]:
    """The JSON schema of experiment files."""
    from fedllm.schema import experiment_schema

    return experiment_schema(METHODS, NOUNS)


def _override(spec: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"'{override}' is not of the form dotted.key=value")
    place, steps = spec, key.split(".")
    for step in steps[:-1]:
        inner = place.get(step)
        if isinstance(inner, str):  # a component by name alone
            inner = {inner: {}} if steps[steps.index(step) + 1] == inner else {}
        place[step] = inner = inner if isinstance(inner, dict) else {}
        place = inner
    try:
        place[steps[-1]] = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of '{override}' is not YAML") from error


def _record(cls: type, value: Any, path: str) -> Any:
    """A frozen dataclass from a mapping of its fields."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path or 'the experiment'} must be a mapping, not {value!r}")
    hints, known = _hints(cls), {item.name: item for item in fields(cls)}
    for key in value:
        if key not in known:
            raise ConfigError(f"unknown key '{_dotted(path, key)}'{nearest(str(key), known)}")
    for name, item in known.items():
        if name not in value and item.default is MISSING and item.default_factory is MISSING:
            raise ConfigError(f"'{_dotted(path, name)}' is missing; set it")
    return cls(**{key: _value(hints[key], given, _dotted(path, key)) for key, given in value.items()})


def _value(hint: Any, value: Any, path: str) -> Any:
    """A value of the type that a field declares."""
    if hint in NOUNS:
        return _component(hint, value, path)
    inner = get_args(hint)
    if get_origin(hint) is tuple and inner[0] in NOUNS:
        if not isinstance(value, list):
            raise ConfigError(f"{path} must be a list, not {value!r}")
        return tuple(_component(inner[0], item, f"{path}[{place}]") for place, item in enumerate(value))
    if get_origin(hint) in (Union, types.UnionType) and any(option in NOUNS for option in inner):
        return None if value is None else _component(next(o for o in inner if o in NOUNS), value, path)
    if is_dataclass(hint) and isinstance(hint, type):
        return _record(hint, value, path)
    if hint == tuple[str, ...] and isinstance(value, str):
        value = [value]
    try:
        return TypeAdapter(hint).validate_json(json.dumps(value), strict=True)
    except (ValidationError, TypeError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise ConfigError(f"{path} is {value!r}: {reason[0].lower() + reason[1:]}") from error


def _component(noun: type, value: Any, path: str) -> Any:
    """A component from `{name: settings}`, `{name: value}` or `name`."""
    if isinstance(value, str):
        value = {value: {}}
    if not isinstance(value, Mapping) or len(value) != 1:
        raise ConfigError(f"{path} must be one name with its settings, not {value!r}")
    ((name, settings),) = value.items()
    table = NOUNS[noun]
    if name not in table:
        raise ConfigError(f"{path}: unknown {noun.__name__.lower()} '{name}'{nearest(str(name), table)}")
    cls = table[name]
    if settings is None:
        settings = {}
    if not isinstance(settings, Mapping):
        first = [item.name for item in fields(cls)][:1]
        if not first:
            raise ConfigError(f"{path}.{name} takes no settings, but {settings!r} is given")
        settings = {first[0]: settings}
    return _record(cls, settings, f"{path}.{name}")


def _plain(value: Any) -> Any:
    """A component, a record or a value as YAML would hold it."""
    if is_dataclass(value) and not isinstance(value, type):
        settings = {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
        return {name_of(value): settings} if any(isinstance(value, noun) for noun in NOUNS) else settings
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


@lru_cache(maxsize=256)
def _hints(cls: type) -> Mapping[str, Any]:
    return get_type_hints(cls)


def _dotted(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)
