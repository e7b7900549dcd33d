"""Experiment files: YAML to `Experiment` and back. Unknown keys and names are errors that name the nearest match."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from fedllm.errors import ConfigError, nearest
from fedllm.experiment.catalog import NOUNS, name_of
from fedllm.experiment.methods import METHODS
from fedllm.experiment.overrides import all_overridden
from fedllm.experiment.presets import expand
from fedllm.experiment.reader import ConfigReader, hints
from fedllm.experiment.record import Experiment
from fedllm.experiment.yaml import read_yaml
from fedllm.stages.base import Stage

# By record, settings that came after runs were made, and their defaults: left out of the hash, which stays what it was.
LATER: Mapping[str, Mapping[str, Any]] = {"evaluation": {"personal": None}}
ABOUT = "about"  # what a resolved file says of itself; not part of the experiment


def load(file: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """An experiment from a file, or from a packaged recipe's name, with `dotted.key=value` overrides.

    Raises:
        ConfigError: names the file, the key and what to do.
    """
    path = find(file)
    try:
        spec = parse(_text(path))
        return build(all_overridden(spec, overrides), folder=path.parent)
    except ConfigError as error:
        raise ConfigError(f"{path.name}: {error}") from error


def find(file: str | Path) -> Path:
    """The file itself, or a packaged recipe."""
    path, recipes = Path(file), Path(__file__).parent.parent / "recipes"
    if path.is_file():
        return path
    if (recipes / f"{file}.yaml").is_file():
        return recipes / f"{file}.yaml"
    around = path.parent.glob("*.y*ml") if path.parent.is_dir() else ()
    known = [*(recipe.stem for recipe in recipes.glob("*.yaml")), *(str(found) for found in around)]
    raise ConfigError(f"there is no file or packaged recipe '{file}'{nearest(str(file), known)}")


def parse(text: str) -> dict[str, Any]:
    """YAML to a mapping."""
    spec = read_yaml(text)
    if not isinstance(spec, dict):
        raise ConfigError("an experiment is a mapping with the keys task, federation, work, method, rounds")
    return spec


def build(spec: Mapping[str, Any], *, folder: Path | None = None) -> Experiment:
    """An experiment from a mapping.

    With `folder`, where the file lies, a relative path of a data file, model or adapter that is not found from the
    working directory is looked for there. What is found is written as `folder / path` with the folder as the caller
    names it: a project that is run from its own root has the same hash on every machine, and the recorded experiment
    finds its files again from the same working directory. Contents are no part of the hash.
    """
    reader = ConfigReader(folder)
    spec = {key: value for key, value in spec.items() if key != ABOUT}
    if "method" in spec:
        spec = _expanded(spec, reader)
    elif "stages" not in spec:
        raise ConfigError("an experiment needs 'method' (see: fedllm ls methods) or 'stages'")
    experiment: Experiment = reader.record(Experiment, spec, "")
    return experiment


def override(experiment: Experiment, overrides: Sequence[str]) -> Experiment:
    """An experiment with some settings changed."""
    return build(all_overridden(dump(experiment), overrides))


def dump(experiment: Experiment) -> dict[str, Any]:
    """The experiment as a mapping with every default written out; `build` turns it back into an equal one.

    Raises:
        ConfigError: a component made in Python holds something else than plain values.
    """
    plain: dict[str, Any] = _plain(experiment, "")
    return plain


def experiment_hash(experiment: Experiment) -> str:
    """SHA-256 of the resolved experiment: the run's identity. Equal experiments have equal hashes."""
    settings = _canonical(_without_defaults(dump(experiment)))
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


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
    from fedllm.experiment.json_schema import experiment_schema

    return experiment_schema(METHODS, NOUNS)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"it is not UTF-8 text (byte {error.start}); save it as UTF-8") from error


def _expanded(spec: Mapping[str, Any], reader: ConfigReader) -> dict[str, Any]:
    """The file with `method` replaced by what it sets, whose values are read once here for their place in errors."""
    types = hints(Experiment)

    def same(key: str, one: Any, two: Any) -> bool:
        return bool(reader.value(types[key], one, key) == reader.value(types[key], two, key))

    expanded, name = expand(spec, METHODS, NOUNS, same)
    if name != spec["method"]:
        for stage in expanded["stages"]:
            reader.component(Stage, stage, f"method.{name}")
    return expanded


def _plain(value: Any, path: str) -> Any:
    """A component, a record or a value as YAML would hold it."""
    if is_dataclass(value) and not isinstance(value, type):
        name = name_of(value) if isinstance(value, tuple(NOUNS)) else None
        place = path if name is None else f"{path}.{name}"
        settings = {item.name: _plain(value.__dict__[item.name], f"{place}.{item.name}") for item in fields(value)}
        return settings if name is None else {name: settings}
    if isinstance(value, tuple | list):
        return [_plain(item, path) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item, f"{path}.{key}") for key, item in value.items()}
    if value is None or isinstance(value, str | int | float):
        return value
    raise ConfigError(
        f"{path.lstrip('.')} is {value!r}, of type {type(value).__name__}; an experiment holds text, numbers, "
        "true, false, null, tuples, mappings and frozen dataclasses of these"
    )


def _without_defaults(dumped: dict[str, Any]) -> dict[str, Any]:
    """Without the settings of LATER that are at their defaults."""
    kept = dict(dumped)
    for record, settings in LATER.items():
        kept[record] = {
            key: value for key, value in dumped[record].items() if key not in settings or value != settings[key]
        }
    return kept


def _canonical(value: Any) -> Any:
    """Equal numbers written alike: 1 and 1.0 are equal in Python, but not in JSON."""
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
