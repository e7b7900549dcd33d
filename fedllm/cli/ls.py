"""`fedllm ls`: names, what they mean, and where they come from."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path

from rich.console import Console

from fedllm.cli import tables
from fedllm.errors import ConfigError, nearest
from fedllm.experiment.catalog import TABLES
from fedllm.experiment.config_file import schema
from fedllm.experiment.methods import METHODS

TableRows = Iterable[tuple[str, ...]]


def listing(what: str) -> None:
    """Print one list.

    Raises:
        ConfigError: there is no such list.
    """
    if what == "schema":
        print(json.dumps(schema(), indent=2))
        return
    if what not in LISTS:
        raise ConfigError(f"there is no list '{what}'{nearest(what, [*LISTS, 'schema'])}")
    heads, rows = LISTS[what]
    tables.show(Console(), heads, rows())


def _methods() -> TableRows:
    for name, method in METHODS.items():
        task = f"task.adapter: {method.adapter}; " if method.adapter else ""
        task += "".join(f"task.adapter.{method.adapter}.{k}: {v}; " for k, v in method.adapter_sets.items())
        task += "".join(f"task.scope.{key}: [{', '.join(map(str, value))}]; " for key, value in method.scope.items())
        stages = ", ".join(entry if isinstance(entry, str) else str(dict(entry)) for entry in method.stages)
        kind = TABLES["adapters"][method.adapter] if method.adapter else None
        alone = "; not batchable" if kind is not None and not getattr(kind, "stackable", False) else ""
        yield name, f"{task}stages: [{stages}]; aggregator: {method.aggregator}{alone}", method.paper


def _classes(what: str) -> Callable[[], TableRows]:
    def rows() -> TableRows:
        for name, cls in TABLES[what].items():
            yield name, _settings(cls), _first_line(_file_of(cls))

    return rows


def _settings(cls: type) -> str:
    return ", ".join(item.name for item in fields(cls)) or "none"


def _file_of(cls: type) -> str | None:
    """The docstring of a component's file, for there is one idea in each."""
    return sys.modules[cls.__module__].__doc__


def _first_line(text: str | None) -> str:
    return (text or "").strip().splitlines()[0]


def _recipes() -> TableRows:
    for path in sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml")):
        yield path.stem, path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")


SETTINGS = ("name", "settings", "what")
LISTS: Mapping[str, tuple[tuple[str, ...], Callable[[], TableRows]]] = {
    "methods": (("name", "sets", "paper"), _methods),
    "stages": (SETTINGS, _classes("stages")),
    "aggregators": (SETTINGS, _classes("aggregators")),
    "works": (SETTINGS, _classes("works")),
    "models": (("name", "title"), lambda: ((name, alias.title) for name, alias in TABLES["models"].items())),
    "data": (("name", "what"), lambda: ((name, data.title) for name, data in TABLES["data"].items())),
    "recipes": (("name", "what"), _recipes),
}
