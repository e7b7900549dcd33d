"""Every table of the command line in 80 columns: whole heads, whole numbers, and nothing that is left out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from io import StringIO

import pytest
from rich import box
from rich.box import Box
from rich.console import Console

from fedllm.cli import tables
from fedllm.cli.display import print_summary
from fedllm.cli.ls import LISTS
from fedllm.cli.seeds import print_spread

WIDTH = 80
METRICS = ("nll", "perplexity", "exact_match", "rouge_l", "accuracy")
GROUPS = ("", "/private", "/shared", "/a group of two words")
NAMES = [f"{metric}{group}" for metric in METRICS for group in GROUPS]


def rendered(
    heads: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = False, style: Box | None = None
) -> str:
    console = Console(file=StringIO(), width=WIDTH)
    tables.show(console, heads, rows, numbers=numbers, box=style)
    return console.file.getvalue()  # type: ignore[attr-defined]


def assert_whole(text: str, words: Sequence[str]) -> None:
    assert "…" not in text and max(map(len, text.splitlines())) <= WIDTH
    shown = set(text.split())
    missing = [word for cell in words for word in cell.split() if word not in shown and len(word) <= tables.LONG]
    assert not missing, (missing, text)


@pytest.mark.parametrize("what", LISTS)
def test_lists(what: str) -> None:
    heads, rows = LISTS[what]
    cells = [tuple(row) for row in rows()]
    text = rendered(heads, cells)
    assert_whole(text, [*heads, *(cell for row in cells for cell in row)])
    assert "".join(sorted("".join(cells[-1]).replace(" ", ""))) != "", "there is a last row"


@pytest.mark.parametrize("style", [None, box.SIMPLE_HEAD])
def test_numbers_that_do_not_fit_stand_in_a_further_table(style: Box | None) -> None:
    clients = ["ann", "second-one", "all"]
    rows = [[client, *(f"{place + 100 * at}.1234" for place in range(len(NAMES)))] for at, client in enumerate(clients)]
    text = rendered(["client", *NAMES], rows, numbers=True, style=style)
    assert_whole(text, [*NAMES, *(cell for row in rows for cell in row)])
    parts = text.count("client ")
    assert 1 < parts < len(NAMES), "several columns a table"
    assert text.count("ann ") == parts, "each begins with the clients"
    numbers = re.findall(r"\d+\.1234", text)
    assert sorted(numbers) == sorted(cell for row in rows for cell in row[1:]), "each number once"


def test_a_table_that_fits_is_one() -> None:
    text = rendered(["client", "nll", "perplexity"], [["ann", "1.2", "3.4"]], numbers=True)
    assert [line.split() for line in text.splitlines()] == [["client", "nll", "perplexity"], ["ann", "1.2", "3.4"]]


def test_a_long_word_is_folded_and_a_control_character_is_none() -> None:
    name = "x" * 100
    text = rendered(["client", "nll"], [[name, "1.2"], ["a\x1b[2Jb", "3.4"]], numbers=True)
    assert text.count("x") == 100 and "\x1b" not in text
    assert "3.4" in text and "1.2" in text


def summary(shift: float = 0.0) -> dict[str, object]:
    """Four models, two of which are also scored on each client's own records."""
    scores = {name: 1.25 + shift for name in NAMES} | {f"own/{name}": 2.5 + shift for name in NAMES}
    return {"eval": dict.fromkeys(("base", "local_only", "federated", "centralised"), scores), "rounds": 2}


def test_the_summary_and_the_seeds_with_all_models_and_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(file=StringIO(), width=WIDTH)
    print_summary(summary(), console)
    print_spread({0: summary(), 1: summary(0.5)}, [0, 1], console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert_whole(text, [*NAMES, "metric", "base", "local-only", "federated", "centralised", "own", "1.500", "±"])
    assert text.count("1.250") == text.count("2.500") == 4 * len(NAMES)
    assert len(re.findall(r"1\.500 ± 0\.3536", text)) == 4 * len(NAMES), "a mean stands beside its spread"
