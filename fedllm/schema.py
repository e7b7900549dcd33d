"""The JSON schema of experiment files, from the same dataclasses that read them."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter

from fedllm.experiment import Experiment

if TYPE_CHECKING:
    from fedllm.catalog import Method, Table


def experiment_schema(methods: Mapping[str, Method], nouns: Mapping[type, Table]) -> dict[str, Any]:
    """An editor with this schema completes keys and names, and marks what `fedllm check` would refuse."""
    schema = _record(Experiment, nouns)
    method = {"anyOf": [{"enum": list(methods)}, {"type": "object", "minProperties": 1, "maxProperties": 1}]}
    schema["properties"]["method"] = method
    schema["properties"]["about"] = {"type": "object"}
    schema["required"] = [name for name in schema["required"] if name != "stages"]
    schema["anyOf"] = [{"required": ["method"]}, {"required": ["stages"]}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "fedllm experiment", **schema}


def _record(cls: type, nouns: Mapping[type, Table]) -> dict[str, Any]:
    hints = get_type_hints(cls)
    required = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
    return {
        "type": "object",
        "description": (cls.__doc__ or "").strip(),
        "properties": {item.name: _value(hints[item.name], nouns) for item in fields(cls)},
        "required": required,
        "additionalProperties": False,
    }


def _value(hint: Any, nouns: Mapping[type, Table]) -> dict[str, Any]:
    inner = get_args(hint)
    if hint in nouns:
        return _component(nouns[hint], nouns)
    if get_origin(hint) is tuple and inner[0] in nouns:
        return {"type": "array", "items": _component(nouns[inner[0]], nouns)}
    if get_origin(hint) in (Union, types.UnionType) and any(option in nouns for option in inner):
        chosen = next(option for option in inner if option in nouns)
        return {"anyOf": [{"type": "null"}, _component(nouns[chosen], nouns)]}
    if get_origin(hint) is tuple and inner and is_dataclass(inner[0]) and isinstance(inner[0], type):
        return {"type": "array", "items": _record(inner[0], nouns)}
    if is_dataclass(hint) and isinstance(hint, type):
        return _record(hint, nouns)
    if hint == tuple[str, ...]:
        return {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
    return TypeAdapter(hint).json_schema()


def _component(table: Table, nouns: Mapping[type, Table]) -> dict[str, Any]:
    options: list[dict[str, Any]] = [{"enum": list(table)}]
    for name, cls in table.items():
        record = _record(cls, nouns)
        settings: list[dict[str, Any]] = [record, {"type": "null"}]
        if record["properties"]:
            settings.append(next(iter(record["properties"].values())))
        one = {"type": "object", "properties": {name: {"anyOf": settings}}, "required": [name]}
        options.append({**one, "additionalProperties": False})
    return {"anyOf": options}
