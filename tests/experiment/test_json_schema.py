"""The JSON schema says of a file's form what the loader says, for good files and bad ones.

`fits` reads the part of JSON Schema that the schema uses; where the package jsonschema is installed, it is asked too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fedllm
from fedllm.engines.base import Engine
from fedllm.errors import ConfigError
from fedllm.experiment.catalog import NOUNS
from fedllm.experiment.config_file import build, dump, parse, schema
from fedllm.experiment.methods import METHODS
from fedllm.stages.base import Stage
from tests.strategies import PLAIN, experiments

SCHEMA = schema()
TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "null": type(None),
    "integer": int,
    "number": (int, float),
}
NOTES = {"$schema", "title", "description", "default"}
RECIPES = sorted((Path(fedllm.__file__).parent / "recipes").glob("*.yaml"))


def fits(rule: Mapping[str, Any], value: Any) -> bool:
    """A value under a schema. A keyword that is not known here fails the test, so that none is passed over."""
    return all(_holds(word, said, rule, value) for word, said in rule.items() if word not in NOTES)


def _holds(word: str, said: Any, rule: Mapping[str, Any], value: Any) -> bool:
    match word:
        case "type":
            number = said in ("integer", "number")
            return isinstance(value, TYPES[said]) and not (number and isinstance(value, bool))
        case "enum":
            return any(value == choice and type(value) is type(choice) for choice in said)
        case "const":
            return value == said and type(value) is type(said)
        case "anyOf":
            return any(fits(option, value) for option in said)
        case "required":
            return not isinstance(value, dict) or all(key in value for key in said)
        case "properties":
            return not isinstance(value, dict) or all(fits(said[key], value[key]) for key in said if key in value)
        case "additionalProperties":
            others = (
                [value[key] for key in value if key not in rule.get("properties", {})]
                if isinstance(value, dict)
                else []
            )
            return said is True or all(said is not False and fits(said, other) for other in others)
        case "items":
            return not isinstance(value, list) or said is False or all(fits(said, item) for item in value)
        case "prefixItems":
            return not isinstance(value, list) or all(map(fits, said, value))
        case "minItems":
            return not isinstance(value, list) or len(value) >= said
        case "maxItems":
            return not isinstance(value, list) or len(value) <= said
    raise AssertionError(f"the schema uses '{word}', which this test does not know")


def accepted(spec: Any) -> bool:
    """By the schema; jsonschema and `fits` agree."""
    plain = json.loads(json.dumps(spec))
    verdict = fits(SCHEMA, plain)
    if find_spec("jsonschema"):
        from jsonschema import Draft202012Validator

        assert Draft202012Validator(SCHEMA).is_valid(plain) == verdict
    return verdict


FORM = ("unknown", "is missing", "input should", "must be a mapping", "must be one name", "must be a list, not")
FORM += ("takes no settings", "names Python code", "an experiment needs", "has no setting", "method must be a name")


def loaded(spec: Any) -> bool:
    """By the loader, as far as the form goes: ranges and what excludes another setting are no part of a schema."""
    try:
        build(spec)
    except ConfigError as error:
        return not any(sign in str(error) for sign in FORM)
    return True


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_packaged_recipes_fit(recipe):
    spec = parse(recipe.read_text(encoding="utf-8"))
    spec["federation"]["shards"].setdefault("data", "given on the command line")
    assert accepted(spec)
    assert not accepted({**spec, "rouds": 3})


def test_a_schema_of_the_schema():
    assert SCHEMA["$schema"].startswith("https://json-schema.org/draft/2020-12")
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA
    assert "$ref" not in json.dumps(SCHEMA)
    if find_spec("jsonschema"):
        from jsonschema import Draft202012Validator

        Draft202012Validator.check_schema(SCHEMA)


@given(experiments)
@settings(max_examples=40)
def test_every_experiment_that_is_written_out_fits(experiment):
    assert accepted(dump(experiment))


MINIMAL = {"task": {"model": "m"}, "federation": {"shards": "x"}, "work": {"sgd": {"steps": 1}}, "method": "fedavg"}
GOOD = [
    {},
    {"method": {"fedprox": {"mu": 0.1}}},
    {"method": {"fedprox": None}},
    {"method": {"scaffold": {"allow": ["adamw"], "denominator": "cohort"}}},
    {"stages": ["prox", {"by_examples": {}}], "method": "fedprox"},
    {"about": {"name": "x"}},
    {"about": 3},
    {"stages": [{"keep": "*lora_B"}, {"keep": ["*a"]}, {"prox": 1}, {"prox": None}, {"prox": {"mu": 0.5}}, "uniform"]},
    {"task": {"model": "m", "adapter": "lora", "scope": {"train": "*A"}}},
    {"task": {"model": "m", "adapter": {"lora": 4}}},
    {"task": {"model": "m", "adapter": {"peft": {"type": "ia3", "settings": {"a": [1, None]}}}}},
    {"federation": {"shards": {"data": "x", "heldout": 0.5, "fields": {"prompt": "q"}}}},
    {"federation": {"shards": {"data": "x", "failures": [{"client": "a", "round": 0}], "partition": {"by": "y"}}}},
    {"federation": {"shards": {"data": "x", "profiles": {"a*": {"rank": 4, "steps": 2, "lr": 1}, "b": {"lr": None}}}}},
    {"work": {"sgd": {"epochs": 1, "lr": 1, "betas": [0.9, 0.99], "lr_schedule": {"shape": "cosine"}}}},
    {"evaluation": {"metrics": "nll", "every": None, "compare": ["local_only"], "compare_lr": [1, 0.5]}},
]
BAD = [
    {"rouds": 3},
    {"rounds": "3"},
    {"rounds": True},
    {"rounds": 2.5},
    {"rounds": None},
    {"method": "fedprx"},
    {"method": {"fedprox": {"nu": 1}}},
    {"method": {"fedprox": {"mu": "x"}}},
    {"method": {"fedprox": 0.1}},
    {"method": {"fedprox": {}, "fedavg": {}}},
    {"method": None},
    {"stages": "prox"},
    {"stages": [{"proxy": 1}]},
    {"stages": [{"prox": {"mv": 1}}]},
    {"stages": [{"prox": 1, "uniform": None}]},
    {"stages": ["quantize"]},
    {"stages": [{"my.module:Stage": {}}]},
    {"stages": [3]},
    {"task": {"adapter": "lora"}},
    {"task": {"model": 3}},
    {"task": {"model": "m", "adapter": {"lora": {"rnk": 4}}}},
    {"task": {"model": "m", "adapter": {"lora": "four"}}},
    {"task": {"model": "m", "adapter": None}},
    {"task": {"model": "m", "dtype": "fp32"}},
    {"federation": {"shards": {"data": "x", "heldout": True}}},
    {"federation": {"shards": {"data": "x", "fields": {"prompt": 3}}}},
    {"federation": {"shards": {"data": "x", "failures": [{"client": "a"}]}}},
    {"federation": {"shards": {"data": "x", "failures": [{"client": "a", "round": 0, "cal": "w"}]}}},
    {"federation": {"shards": {"data": "x", "profiles": {"a": {"stps": 2}}}}},
    {"federation": {"shards": {"data": "x", "profiles": {"a": {"batch_size": 2.5}}}}},
    {"federation": {"shards": {"data": "x", "profiles": [{"steps": 2}]}}},
    {"federation": {"shards": {"partition": {"by": "y"}}}},
    {"federation": {"sherds": "x"}},
    {"work": {"sgd": {"steps": 1, "betas": [0.9]}}},
    {"work": {"sgd": {"steps": 1, "lr_schedule": "cosine"}}},
    {"aggregator": {"sum": 3}},
    {"aggregator": None},
    {"evaluation": {"metrics": [1]}},
    {"evaluation": {"compare": ["local"]}},
    {"evaluation": {"compare": "local_only"}},
    {"demands": {"secrecy": "yes"}},
]


@pytest.mark.parametrize("change", GOOD, ids=json.dumps)
def test_good_files_fit(change):
    spec = {**MINIMAL, **change}
    if "stages" in change and "method" not in change:
        del spec["method"]
    build(spec)
    assert accepted(spec)


@pytest.mark.parametrize("change", BAD, ids=json.dumps)
def test_bad_files_do_not_fit(change):
    spec = {**MINIMAL, **change}
    if "stages" in change:
        del spec["method"]
    with pytest.raises(ConfigError):
        build(spec)
    assert not accepted(spec)


@pytest.mark.parametrize("missing", ["task", "federation", "work", "method"])
def test_what_is_missing_does_not_fit(missing):
    spec = {key: value for key, value in MINIMAL.items() if key != missing}
    assert not accepted(spec)
    assert not loaded(spec)


VALUES = st.sampled_from(
    [True, None, 3, -1, 0.5, "x", "3", "lora", "fedavg", [], ["x"], [1.5], {}, {"x": 1}, {"lora": 2}, {"prox": None}]
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a plain value."""
    found = [path] if path else []
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            found += places(item, (*path, key))
    return found


def mutated(value: Any, path: tuple[Any, ...], how: str, new: Any) -> Any:
    """A value with something else, something more or nothing at a place."""
    copy = list(value) if isinstance(value, list) else dict(value)
    if len(path) > 1:
        copy[path[0]] = mutated(value[path[0]], path[1:], how, new)
    elif how == "drop" and isinstance(copy, dict):
        del copy[path[0]]
    elif how == "add" and isinstance(copy, dict):
        copy["extra"] = new
    else:
        copy[path[0]] = new
    return copy


@given(st.data())
@settings(max_examples=150)
def test_schema_and_loader_agree_on_files_with_one_fault(data):
    experiment = data.draw(experiments)
    spec = dump(experiment)
    if data.draw(st.booleans()):
        del spec["stages"]
        spec["method"] = data.draw(st.sampled_from(["fedavg", {"fedadam": {"tau": 1}}, {"scaffold": {"allow": ["x"]}}]))
    path = data.draw(st.sampled_from(places(spec)))
    spec = mutated(spec, path, data.draw(st.sampled_from(["set", "drop", "add"])), data.draw(VALUES))
    assert accepted(spec) == loaded(spec)


def test_editors_can_complete_every_name():
    text = json.dumps(SCHEMA)
    for name in [
        *METHODS,
        *(name for noun, table in NOUNS.items() if noun is not Engine for name in table),
    ]:  # no file names one
        assert f'"{name}"' in text
    stages = SCHEMA["properties"]["stages"]["items"]["anyOf"]
    assert {next(iter(option["properties"])) for option in stages[1:]} == NOUNS[Stage].keys()
    assert dump(PLAIN).keys() <= SCHEMA["properties"].keys()
