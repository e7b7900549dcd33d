"""What is written into pages when the site is built: every key of an experiment file, and packaged recipes.

MkDocs runs this file as a hook. `<!-- settings -->` becomes the tables of the dataclasses that read the file, so they
cannot differ from it; `<!-- recipe: NAME -->` becomes the recipe's file.
"""

from __future__ import annotations

import inspect
import re
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from fedllm.experiment import config_file
from fedllm.experiment.catalog import NOUNS, name_of
from fedllm.experiment.methods import METHODS, Method
from fedllm.experiment.record import Experiment

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

RECIPES = Path(config_file.__file__).parent.parent / "recipes"
PLAIN: Mapping[Any, str] = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
    type(None): "null",
}


def settings() -> str:
    """Markdown: the records of an experiment, then the components by noun, then the methods."""
    parts = ["## Records", *(section(cls, title, 3) for title, cls in records(Experiment, "the experiment"))]
    for noun, table in NOUNS.items():
        parts += [f"## {noun.__name__}", *(section(cls, f"`{name}`", 3) for name, cls in table.items())]
    return "\n\n".join([*parts, "## Methods", methods()])


def records(cls: type, title: str) -> Iterator[tuple[str, type]]:
    """A record and those inside of it and of components: title, class."""
    yield title, cls
    for name, hint in get_type_hints(cls).items():
        for inner in [hint, *get_args(hint)]:
            if isinstance(inner, type) and is_dataclass(inner) and inner not in NOUNS and not is_component(inner):
                yield from records(inner, f"`{name}`")
    if cls is Experiment:
        for component in (component for table in NOUNS.values() for component in table.values()):
            yield from list(records(component, ""))[1:]


def is_component(cls: type) -> bool:
    """True if an experiment file names the class."""
    return any(issubclass(cls, noun) for noun in NOUNS)


def section(cls: type, title: str, level: int) -> str:
    """One record or component: what it is, and its settings."""
    prose, arguments = described(cls)
    head = "| key | type | default |\n| --- | --- | --- |\n"
    rows = "\n".join(f"| {' | '.join(row)} |" for row in table_rows(cls))
    return "\n\n".join([f"{'#' * level} {title}", prose, *([head + rows] if rows else ["No settings."]), *arguments])


def table_rows(cls: type) -> Iterator[tuple[str, str, str]]:
    """Key, type, default of each field."""
    hints = get_type_hints(cls)
    for item in fields(cls):
        default = item.default if item.default_factory is MISSING else item.default_factory()
        words = kind(hints[item.name]).replace("a record", f"a record: [{item.name}](#{item.name})")
        yield f"`{item.name}`", words, "required" if default is MISSING else plain(default)


def kind(hint: Any) -> str:
    """A field's type in words."""
    inner, origin = get_args(hint), get_origin(hint)
    if hint in NOUNS:
        return f"a component: [{hint.__name__}](#{hint.__name__.lower()})"
    if origin is Literal:
        return "one of " + ", ".join(f"`{value}`" for value in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(kind(option) for option in inner)
    if origin is tuple:
        return f"list of {kind(inner[0])}" if Ellipsis in inner else f"list of {len(inner)}: {kind(inner[0])}"
    if origin is not None and issubclass(origin, Mapping):
        return f"mapping of text to {kind(inner[1])}" if is_dataclass(inner[1]) else "mapping"
    return PLAIN.get(hint, "a record")


def plain(value: Any) -> str:
    """A default as a file would write it."""
    if is_dataclass(value) and not isinstance(value, type):
        return f"`{name_of(value)}`" if is_component(type(value)) else "its defaults"
    listed = list(value) if isinstance(value, tuple) else value
    return f"`{yaml.safe_dump(listed, default_flow_style=True, width=1000).removesuffix('...' + chr(10)).strip()}`"


def described(cls: type) -> tuple[str, list[str]]:
    """What a class is: its file's docstring, if the file is its own; its own; and its arguments as a list."""
    prose, _, rest = inspect.cleandoc(cls.__doc__ or "").partition("\nArgs:\n")
    for base in (base for base in cls.__mro__[1:] if is_dataclass(base)):  # settings that it shares with others
        rest += "\n" + inspect.cleandoc(base.__doc__ or "").partition("\nArgs:\n")[2]
    if is_component(cls) and cls.__module__.rpartition(".")[2] == name_of_class(cls):
        prose = f"{inspect.cleandoc(sys.modules[cls.__module__].__doc__ or '')}\n\n{prose}"
    entries = re.split(r"\n(?=    \S)", rest)
    listed = ["- " + " ".join(entry.split()) for entry in entries if entry.strip()]
    return prose.strip(), ["\n".join(listed)] if listed else []


def name_of_class(cls: type) -> str | None:
    """The catalog's name of a component."""
    return next((name for table in NOUNS.values() for name, other in table.items() if other is cls), None)


def methods() -> str:
    """Every preset and what it sets."""
    rows = [
        f"| `{name}` | `{yaml.safe_dump(list(method.stages), default_flow_style=True).strip()}` "
        f"| {f'`{method.adapter}`' if method.adapter else ''} | {scope_of(method)} | {method.paper} |"
        for name, method in METHODS.items()
    ]
    return "\n".join(["| method | stages | adapter | scope | paper |", "| --- | --- | --- | --- | --- |", *rows])


def scope_of(method: Method) -> str:
    """What a method sets of `task.scope`."""
    return ", ".join(f"`{key}: [{', '.join(map(str, value))}]`" for key, value in method.scope.items())


def recipe(name: str) -> str:
    """A packaged recipe as a block."""
    return f"```yaml\n{(RECIPES / f'{name}.yaml').read_text(encoding='utf-8')}```"


def filled(markdown: str) -> str:
    """A page with its places filled in."""
    markdown = re.sub(r"<!-- recipe: ([\w-]+) -->", lambda found: recipe(found[1]), markdown)
    return markdown.replace("<!-- settings -->", settings()) if "<!-- settings -->" in markdown else markdown


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in what a page asks for."""
    return filled(markdown)
