"""The tables of what a component may declare, written into their page when the site is built.

MkDocs runs this file as a hook. `<!-- traits -->` becomes the fields of `Traits`; `<!-- brackets -->`, `<!-- facts -->`
and `<!-- sums -->` become the members of the two enumerations and the names for several facts, each with the comment
that stands beside it in the code. Who needs a fact and who loses it is asked of the components of the catalog, at their
defaults and at the other values of each setting that is one of a few, and of the keys that have a say.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields, replace
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args, get_origin, get_type_hints

from fedllm.aggregators.base import Aggregator
from fedllm.data.shards import Shards
from fedllm.experiment.catalog import NOUNS
from fedllm.experiment.checks.parties import client, parties
from fedllm.experiment.record import Demands, Experiment
from fedllm.experiment.schedules import Schedule
from fedllm.messages import traits
from fedllm.messages.context import Profile
from fedllm.messages.traits import NONE, Fact, Traits
from fedllm.models.adapters.lora import Lora
from fedllm.models.adapters.weights import Full
from fedllm.models.task import Scope, Task
from fedllm.stages.base import Stage
from fedllm.stages.weighting.uniform import Uniform
from fedllm.training.base import Work
from fedllm.training.sgd import Sgd

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

NOUNS_WITH_TRAITS = (Stage, Work, Aggregator, Schedule)


class Declared(NamedTuple):
    """A component of the catalog, its traits, and the setting at which it has them; "" for its defaults."""

    name: str
    setting: str
    traits: Traits


def components() -> Iterator[Declared]:
    """Each, at its defaults and beside them."""
    for noun in NOUNS_WITH_TRAITS:
        for name, cls in NOUNS[noun].items():
            fixed = inspect.getattr_static(cls, "traits")
            if isinstance(fixed, Traits):  # the same whatever the settings
                yield Declared(name, "", fixed)
                continue
            yield Declared(name, "", made(cls).traits)
            for key, hint in get_type_hints(cls).items():
                for value in get_args(hint) if get_origin(hint) is Literal else ():
                    yield Declared(name, f"{key}: {value}", made(cls, **{key: value}).traits)


def keys() -> Iterator[Declared]:
    """What else has a say, for a task in which all of it does, and for clients that differ."""
    task = Task("tiny-llama", Lora(init="singular"), scope=Scope(freeze=("a",), alternate=("b", "c")), quantize="int4")
    stages, demands = (Uniform(),), Demands(secrecy=True)
    experiment = Experiment(task=task, federation=Shards(""), work=Sgd(steps=0), stages=stages, demands=demands)
    full = replace(experiment, task=replace(task, adapter=Full()))
    clients = [client(f"with a {key}", Profile(**{key: 1}), task) for key in ("rank", "bandwidth")]
    for party in (*parties(experiment), *parties(full), *clients):
        if party.key != "stages" and not party.name.startswith(("work ", "schedule ", "aggregator ")):
            yield Declared(party.name.replace("client", "a client"), "", party.traits)


def made(cls: type, **settings: object) -> Stage | Work | Aggregator | Schedule:
    """A component; a work without steps does nothing, and what has no default is any number."""
    given: dict[str, object] = {"steps": 0} if issubclass(cls, Work) else {}
    for item in fields(cls):
        if item.default is MISSING and item.default_factory is MISSING:
            given.setdefault(item.name, 1)
    component: Stage | Work | Aggregator | Schedule = cls(**{**given, **settings})
    return component


def said(kind: str, fact: Fact) -> str:
    """Who says a fact of a kind: "needs", "gives" or "loses"."""
    found: dict[str, list[str]] = {}
    for component in (*components(), *keys()):
        if fact in getattr(component.traits, kind):
            found.setdefault(component.name, []).append(component.setting)
    return ", ".join(words(name, at) for name, at in found.items())


def words(name: str, settings: Sequence[str]) -> str:
    """A name as the table has it, with the settings at which it counts where that is not at all of them."""
    shown = name if name.startswith("a client") else f"`{name}`"
    return shown if "" in settings else f"{shown} ({', '.join(settings)})"


def comments(cls: type) -> dict[str, str]:
    """The members of an enumeration, each with the comment behind it."""
    return dict(re.findall(r"^    (\w+) = [^#\n]+  # (.+)$", inspect.getsource(cls), re.MULTILINE))


def field_table() -> str:
    """The fields of `Traits`, as their docstring has them."""
    _, _, text = inspect.cleandoc(Traits.__doc__ or "").partition("Args:\n")
    entries = [" ".join(entry.split()) for entry in re.split(r"\n(?=    \S)", text)]
    rows = [f"| `{'`, `'.join(names.split(', '))}` | {what} |" for names, what in (e.split(": ", 1) for e in entries)]
    return "\n".join(["| field | what |", "| --- | --- |", *rows])


def bracket_table() -> str:
    """The brackets in their order."""
    rows = [f"| `{name}` | {what} |" for name, what in comments(traits.Bracket).items()]
    return "\n".join(["| bracket | a stage that |", "| --- | --- |", *rows])


def fact_table() -> str:
    """The facts, and who says them."""
    rows = []
    for name, what in comments(Fact).items():
        fact = Fact[name]
        needs, loses = "; ".join(filter(None, (said("needs", fact), given(fact)))), said("loses", fact)
        fragile = "what encodes and does not keep it" if fact in traits.FRAGILE else ""
        rows.append(f"| `{name}` | {what} | {needs} | {'; '.join(filter(None, (loses, fragile)))} |")
    return "\n".join(["| fact | what holds | needed or given by | lost by |", "| --- | --- | --- | --- |", *rows])


def given(fact: Fact) -> str:
    """Who gives a fact."""
    names = said("gives", fact)
    return f"given by {names}" if names else ""


def sums() -> dict[str, str]:
    """The names for several facts at once, each with the comment behind it."""
    found = re.findall(r"^([A-Z_]+) = [^#\n]+  # (.+)$", inspect.getsource(traits), re.MULTILINE)
    return {name: what for name, what in found if isinstance(getattr(traits, name), Fact)}


def sum_table() -> str:
    """The names for several facts."""
    rows = []
    for name, what in sums().items():
        parts = ", ".join(f"`{fact.name}`" for fact in NONE | getattr(traits, name))
        rows.append(f"| `{name}` | {what} | {parts} |")
    return "\n".join(["| name | of a stage, if | stands for |", "| --- | --- | --- |", *rows])


PLACES = {"traits": field_table, "brackets": bracket_table, "facts": fact_table, "sums": sum_table}


def filled(markdown: str) -> str:
    """A page with its tables."""
    for place, table in PLACES.items():
        if f"<!-- {place} -->" in markdown:
            markdown = markdown.replace(f"<!-- {place} -->", table())
    return markdown


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Write the tables where a page asks for them."""
    return filled(markdown)
