"""The JSON schema of experiment files, from the same dataclasses that read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import TYPE_CHECKING, Any, get_args, get_origin

from pydantic import TypeAdapter

from fedllm.experiment.presets import passed_on
from fedllm.experiment.reader import component_type, hints, record_of
from fedllm.experiment.record import Experiment
from fedllm.stages.base import Stage

if TYPE_CHECKING:
    from fedllm.experiment.catalog import Table
    from fedllm.experiment.methods import Method

Schema = dict[str, Any]
NULL: Schema = {"type": "null"}


def experiment_schema(methods: Mapping[str, Method], nouns: Mapping[type, Table]) -> Schema:
    """An editor with this schema completes keys and names, and marks what `fedllm check` would refuse by its form."""
    schema = _record(Experiment, nouns)
    schema["properties"]["method"] = _method(methods, nouns[Stage])
    schema["properties"]["about"] = {"description": "what a run folder says of itself; ignored"}
    schema["required"] = [name for name in schema["required"] if name != "stages"]
    schema["anyOf"] = [{"required": ["method"]}, {"required": ["stages"]}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "fedllm experiment", **schema}


def _record(cls: type, nouns: Mapping[type, Table]) -> Schema:
    known = fields(cls)
    return {
        "type": "object",
        "description": (cls.__doc__ or "").strip(),
        "properties": {item.name: _value(hints(cls)[item.name], nouns) for item in known},
        "required": [f.name for f in known if f.default is MISSING and f.default_factory is MISSING],
        "additionalProperties": False,
    }


def _value(hint: Any, nouns: Mapping[type, Table]) -> Schema:
    noun, inner = component_type(hint), get_args(hint)
    if noun is not None:
        component = _component(nouns[noun], nouns)
        return component if noun is hint else {"anyOf": [NULL, component]}
    if get_origin(hint) is tuple and (inner[0] in nouns or is_dataclass(inner[0])):
        return {"type": "array", "items": _value(inner[0], nouns)}
    record = record_of(hint)
    if record is not None:
        return _record(record, nouns) if record is hint else {"anyOf": [NULL, _record(record, nouns)]}
    if get_origin(hint) is Mapping and is_dataclass(inner[1]):
        return {"type": "object", "additionalProperties": _value(inner[1], nouns)}
    if hint == tuple[str, ...]:
        return {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
    return TypeAdapter(hint).json_schema()


def _component(table: Table, nouns: Mapping[type, Table]) -> Schema:
    options: list[Schema] = [{"enum": [name for name, cls in table.items() if not _record(cls, nouns)["required"]]}]
    for name, cls in table.items():
        options.append(_named(name, _settings(_record(cls, nouns))))
    return {"anyOf": options}


def _settings(record: Schema) -> Schema:
    """A component's settings: a mapping, its first setting alone, or nothing."""
    first = next(iter(record["properties"]), None)
    forms = [record]
    if not record["required"]:
        forms.append(NULL)
    if first is not None and set(record["required"]) <= {first}:
        forms.append({**record["properties"][first], "description": first})
    return {"anyOf": forms}


def _method(methods: Mapping[str, Method], table: Table) -> Schema:
    options: list[Schema] = [{"enum": list(methods)}]
    for name, method in methods.items():
        places = passed_on(method, table)
        classes = [table[stage if isinstance(stage, str) else next(iter(stage))] for stage in method.stages]
        known = {key: _value(hints(classes[place])[key], {}) for key, place in places.items()}
        settings = {"type": "object", "properties": known, "additionalProperties": False}
        options.append(_named(name, {"anyOf": [settings, NULL]}))
    return {"anyOf": options}


def _named(name: str, settings: Schema) -> Schema:
    return {"type": "object", "properties": {name: settings}, "required": [name], "additionalProperties": False}
