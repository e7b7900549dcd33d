"""Tables of the documentation hold what the code holds: no row too many, none missing, the same defaults."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass, replace
from fnmatch import fnmatch
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

import pytest
import typer

import fedllm
from fedllm.cli.main import app
from fedllm.errors import CheckError
from fedllm.evaluation.scores import METRICS
from fedllm.events import KINDS
from fedllm.experiment.catalog import NOUNS, STAGES
from fedllm.experiment.checks.check import check
from fedllm.experiment.methods import METHODS
from fedllm.experiment.record import Experiment
from fedllm.experiment.yaml import read_yaml
from fedllm.messages import traits
from fedllm.messages.traits import Bracket, Fact, Traits
from fedllm.stages.base import Stage
from fedllm.stages.client_drift.prox import Prox
from fedllm.stages.compression.quantize import Quantize
from fedllm.stages.compression.top_k import TopK
from fedllm.stages.personalization.keep import Keep
from fedllm.stages.server_optimizers.adam import Adam
from fedllm.stages.weighting.by_examples import ByExamples
from fedllm.tensors import tree
from tests.conformance.table import CASES
from tests.papers.quadratics import federate, leaves
from tests.test_docs import ROOT, load, reference
from tests.test_docs_run import fragment

DOCS = ROOT / "docs"
pages = load(DOCS / "gen_settings.py")
gen_traits = load(DOCS / "gen_traits.py")


def rows(page: str, heading: str = "") -> list[list[str]]:
    """The cells of the tables of a page, or of one section of it; heads and rules are left out."""
    text = (DOCS / page).read_text("utf-8")
    if heading:
        text = re.split(rf"^#+ {re.escape(heading)}$", text, flags=re.MULTILINE)[1]
        text = re.split(r"^## ", text, maxsplit=1, flags=re.MULTILINE)[0]
    found = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:1] == "|"]
    rules = {place for place, row in enumerate(found) if set("".join(row)) <= set("-| ")}
    return [[c.strip("| ") for c in row] for place, row in enumerate(found) if not {place, place + 1} & rules]


def code(cell: str) -> list[str]:
    """What stands in a cell between backquotes."""
    return re.findall(r"`([^`]+)`", cell)


def test_every_event_and_its_fields_are_listed() -> None:
    listed = {code(row[0])[0]: set(code(row[2])) for row in rows("how-to/run-folder.md", "Events")}
    assert listed == {name: {item.name for item in fields(cls)} for name, cls in KINDS.items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with personal leaves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDLLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        spec = read_yaml(dict(titled("how-to/index.md"))["tiny.yaml"])
        spec["task"]["scope"] = {"share": "*lora_A"}
        return fedllm.run(fedllm.build({**spec, "rounds": 1}), out=tmp_path_factory.mktemp("run") / "RUN").folder


def titled(page: str) -> Iterator[tuple[str, str]]:
    text = (DOCS / page).read_text("utf-8")
    yield from re.findall(r"^```\w+ title=\"([^\"]+)\"\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_every_figure_of_the_summary_is_listed(finished: Path) -> None:
    listed = [name for row in rows("how-to/run-folder.md", "summary.json") for name in code(row[0])]
    asked = [name for name in listed if name != "personal"]  # where evaluation.personal asks for it
    assert asked == list(json.loads((finished / "summary.json").read_text()))


@pytest.mark.slow
def test_every_file_of_a_run_is_listed(finished: Path) -> None:
    listed = [name for row in rows("how-to/run-folder.md", "Read a run folder") for name in code(row[0])]
    patterns = [re.sub(r"\bID\b|\bN\b", "*", name) + ("*" if name.endswith("/") else "") for name in listed]
    files = [path.relative_to(finished).as_posix() for path in finished.rglob("*") if path.is_file()]
    assert [name for name in files if not any(fnmatch(name, pattern) for pattern in patterns)] == []
    later = (
        "eval",
        "audit.json",
        "reconstruction.json",
        "export-",
        "report.html",
        "privacy.",
        "clients/NAME/",
        "personal.json",
    )
    made = [pattern for pattern in patterns if not pattern.startswith(later)]
    assert [pattern for pattern in made if not any(fnmatch(name, pattern) for name in files)] == []


def test_every_verb_and_option_is_listed() -> None:
    verbs = {name: verb for name, verb in typer.main.get_command(app).commands.items()}  # type: ignore[attr-defined]
    listed = {code(row[0])[0].split()[1] for row in rows("reference/command-line.md")[: len(verbs)]}
    assert listed == set(verbs)
    options = {(code(row[0])[0], code(row[1])[0]): row[2] for row in rows("reference/command-line.md", "Options")}
    known = {
        (name, max(option.opts, key=len)): option.default
        for name, verb in verbs.items()
        for option in verb.params
        if option.opts[0].startswith("--") and option.name != "help"
    }
    assert set(options) == set(known)
    for key, default in known.items():
        if isinstance(default, (int, str)) and not isinstance(default, bool):
            assert str(default) in options[key], key


def test_every_metric_is_listed() -> None:
    assert {code(row[0])[0] for row in rows("how-to/evaluate.md", "Metrics")} == {*METRICS, "perplexity"}


def test_methods_and_their_settings_are_those_of_the_catalog() -> None:
    listed = rows("how-to/methods.md")[: len(METHODS)]
    assert {code(row[0])[0] for row in listed} == set(METHODS)
    for row in listed:
        method = METHODS[code(row[0])[0]]
        adapter = [method.adapter] if method.adapter else []
        sets = [(s, {}) if isinstance(s, str) else next(iter(s.items())) for s in method.stages]
        assert code(row[1]) == [*(name for name, _ in sets), *adapter], row
        known = [(f, own) for name, own in sets for f in fields(STAGES[name]) if name not in WEIGHERS]
        defaults = {f.name: own[f.name] if f.name in own else plain(f) for f, own in known}
        if not row[2].startswith("as "):
            given = {key: value for text in code(row[2]) for key, value in read_yaml(text).items()}
            assert given == {k: list(v) if isinstance(v, tuple) else v for k, v in defaults.items()}, row


WEIGHERS = ("by_examples", "uniform")


def test_hooks_are_those_of_a_stage() -> None:
    methods = [name for name, value in vars(Stage).items() if callable(value) and not name.startswith("_")]
    hooks = [name for name in methods if name not in ("trains_in_round", "personal")]
    assert [code(row[0])[0] for row in rows("how-to/write-a-stage.md", "The five hooks")] == hooks


def declarations(heading: str) -> list[list[str]]:
    """The rows of one table of the page on stages, as the site has it."""
    page = gen_traits.filled((DOCS / "how-to/write-a-stage.md").read_text("utf-8"))
    section = re.split(rf"^\| {heading} \|.*\n\|[-| ]+\|\n", page, flags=re.MULTILINE)[1].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in section.splitlines()]


def test_the_tables_of_declarations_hold_every_field_bracket_and_fact() -> None:
    assert [name for row in declarations("field") for name in code(row[0])[:1]] == [f.name for f in fields(Traits)]
    for heading, members in (("bracket", Bracket), ("fact", Fact)):
        listed = declarations(heading)
        assert [code(row[0])[0] for row in listed] == [member.name for member in members]
        assert all(len(row[1]) > 15 for row in listed), "each member has a comment"
    for row in declarations("name"):
        named, *parts = code(row[0]) + code(row[2])
        assert getattr(traits, named) == reduce(or_, (Fact[part] for part in parts))


def test_the_table_of_facts_names_who_says_each() -> None:
    table = {Fact[code(row[0])[0]]: row for row in declarations("fact")}
    for name, case in CASES.items():
        said = case.stage.traits
        for fact, row in table.items():
            assert (name in code(row[2])) >= (fact in said.needs | said.gives), (name, fact)
            assert (name in code(row[3])) >= (fact in said.loses), (name, fact)
    assert code(table[Fact.DIFFERENCE][3]) == ["lora_product"] and "(form: product)" in table[Fact.DIFFERENCE][3]
    assert code(table[Fact.FIXED_BASIS][3]) == ["lora_stack", "lora_product", "lora_svd", "lora_merge"]
    assert code(table[Fact.WRITABLE_BASE][3]) == ["task.quantize"]


def paper_rows() -> list[list[str]]:
    return [row for row in rows("paper-index.md") if len(row) > 2 and code(row[1]) and row[2].startswith("`tests")]


@pytest.mark.parametrize("row", paper_rows(), ids=lambda row: row[0].split(",")[0])
def test_settings_of_the_paper_index_are_built_and_checked(row: list[str]) -> None:
    fragment(code(row[1])[0])
    assert (ROOT / code(row[2])[0]).is_file(), row[2]


def test_the_paper_index_names_every_method_and_stage() -> None:
    text = " ".join(code(row[1])[0] for row in paper_rows())
    missing = [name for name in [*METHODS, *STAGES] if not re.search(rf"\b{name}\b", text)]
    stages = [stage for method in METHODS.values() for stage in method.stages]
    by_a_method = {stage if isinstance(stage, str) else next(iter(stage)) for stage in stages}
    assert [name for name in missing if name not in by_a_method] == []


def test_tables_of_settings_hold_every_key_and_default() -> None:
    text = pages.settings()
    for table in NOUNS.values():
        for name in table:
            part = re.search(rf"^### `{name}`\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL)
            assert part is not None, name
    for cls in [Experiment, *(cls for table in NOUNS.values() for cls in table.values())]:
        section = pages.section(cls, "x", 3)
        for item in fields(cls):
            (row,) = re.findall(rf"^\| `{item.name}` \| (.*) \| (.*) \|$", section, re.MULTILINE)
            if item.default is MISSING and item.default_factory is MISSING:
                assert row[1] == "required"
            elif not is_dataclass(item.default):
                assert read_yaml(row[1].strip("`")) == plain(item), (cls, item.name)


def plain(item: Any) -> Any:
    value = item.default if item.default_factory is MISSING else item.default_factory()
    return list(value) if isinstance(value, tuple) else value


def test_places_in_pages_are_filled() -> None:
    for path in DOCS.rglob("*.md"):
        filled = pages.filled(path.read_text("utf-8"))
        assert "<!-- recipe" not in filled
        assert "<!-- settings -->" not in filled
    assert "method: fedit" in pages.filled("<!-- recipe: quickstart -->")


def test_the_architecture_names_every_module() -> None:
    listed = {name for row in rows("design/architecture.md", "Layers") for name in code(row[1])}
    assert listed == set(reference.pages())


@pytest.mark.slow
def test_orders_of_six_stages() -> None:
    """The figures of explanation/round-trip.md: which of the 720 orders pass, and where the others end."""
    six = (Keep(("*lora_B",)), Prox(0.1), Adam(server_lr=0.1), TopK(0.5), ByExamples(), Quantize(8))
    experiment = fedllm.load("quickstart")
    ends: dict[bool, list[str]] = {True: [], False: []}
    for order in itertools.permutations(six):
        try:
            check(replace(experiment, stages=order))
            right = True
        except CheckError:
            right = False
        ends[right].append(tree.digest(federate(order, 3, params=leaves(1.0)).params))
    elsewhere = [end for end in ends[False] if end not in ends[True]]
    counted = (len(ends[True]), len(set(ends[True])), len(ends[False]), len(elsewhere))
    assert counted == (6, 1, 714, 684)
    text = " ".join((DOCS / "explanation/round-trip.md").read_text("utf-8").split())
    assert "accepts 6, and these 6 end with the same weights. The other 714" in text
    assert "and 684 of them end with other weights" in text
