"""The documentation is run: a page's files are written, its commands, Python and settings are executed, in order.

What a block of a page means here, by what stands behind its fence:

    yaml title="x.yaml"     a file; if it is a whole experiment, `check` must pass
    yaml                    a fragment: put into a small experiment, it must be built and checked
    csv, json, python ... title="x"     a file
    python                  executed; all such blocks of a page share their names
    bash                    each `fedllm ...` and `python FILE` is executed in this process
    text                    below a block of bash: lines of its output, spaces apart; `...` stands for anything

A comment right above a block changes that:

    refused         the command line refuses it (exit code 2)
    interrupted     Ctrl-C comes after the first round
    real model      the commands are checked instead of run
    shown           it is not executed

`<!-- files: PAGE -->` at a page's head writes the files of another page first.
"""

from __future__ import annotations

import io
import re
import runpy
import sys
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import fedllm
from fedllm.cli import display
from fedllm.cli.main import main
from fedllm.events import Event, RoundFinished
from fedllm.experiment.checks.check import check
from fedllm.experiment.config_file import build, load
from fedllm.experiment.yaml import read_yaml
from tests.test_docs import ROOT, commands

DOCS = ROOT / "docs"
FENCE = re.compile(r"^( *)(`{3,})([^\n]*)\n(.*?)^\1\2 *$", re.MULTILINE | re.DOTALL)
MARKS = ("refused", "interrupted", "real model", "shown")
UNSEEN = {"cd", "git", "pip", "scripts/quickstart", "scripts/test", "scripts/check", "bash", ".venv/bin/pytest"}
SMALL: Mapping[str, Any] = {
    "task": {"model": "tiny-llama"},
    "federation": {"shards": {"data": "quickstart", "heldout": "quickstart-test", "partition": {"by": "organisation"}}},
    "work": {"sgd": {"steps": 1}},
    "method": "fedavg",
}


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, its title, its content, and the mark above it."""

    language: str
    title: str | None
    content: str
    mark: str | None


def blocks(page: Path) -> Iterator[Block]:
    markdown = page.read_text("utf-8")
    for found in FENCE.finditer(markdown):
        indent, _, info, content = found.groups()
        above = re.search(r"<!-- ([a-z ]+) -->\s*\Z", markdown[: found.start()])
        mark = above[1] if above else None
        assert mark is None or mark in MARKS, f"{page}: <!-- {mark} --> means nothing"
        title = re.search(r'title="([^"]+)"', info)
        text = re.sub(rf"^{indent}", "", content, flags=re.MULTILINE)
        yield Block(info.split(" ")[0], title[1] if title else None, text, mark)


def files(page: Path) -> list[Block]:
    """The files that a page needs: those of the pages it names, and its own."""
    named = re.findall(r"<!-- files: ([\w./-]+) -->", page.read_text("utf-8"))
    own = [block for block in blocks(page) if block.title]
    return [*(block for name in named for block in files(page.parent / name)), *own]


class Runner:
    """Runs one page in the working directory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.names: dict[str, Any] = {"__name__": "page"}
        self.output = ""

    def run(self, block: Block) -> None:
        if block.mark == "shown" or block.title:
            return
        match block.language:
            case "bash":
                self.output = "".join(self.command(words, block.mark) for words in commands(block.content))
            case "python":
                exec(compile(block.content, "page", "exec"), self.names)
            case "yaml":
                fragment(block.content)
            case "text" if self.output:
                compare(block.content, self.output)

    def command(self, words: list[str], mark: str | None) -> str:
        """What a command prints."""
        if words[0] in UNSEEN:
            return ""
        if words[0] == "python":
            return captured(lambda: runpy.run_path(words[1], run_name="__main__"))
        assert words[0] == "fedllm", f"the page shows `{' '.join(words)}`, which is not executed"
        if mark == "real model":
            if words[1] not in ("run", "check"):
                return ""
            words = ["fedllm", "check", *(word for word in words[2:] if word == words[2] or "=" in word)]
        code = {"refused": 2, "interrupted": 130}.get(mark or "", 0)
        with self.monkeypatch.context() as patch:
            patch.setattr(sys, "argv", words)
            if mark == "interrupted":
                patch.setattr(display.Display, "__call__", interrupt)
            return captured(lambda: exits(code, words))


def exits(code: int, words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main()
    assert (ended.value.code or 0) == code, f"`{' '.join(words)}` ends with {ended.value.code}"


def interrupt(self: display.Display, event: Event) -> None:
    """Ctrl-C once the first round is complete."""
    if isinstance(event, RoundFinished):
        raise KeyboardInterrupt


def captured(do: Any) -> str:
    stream = io.StringIO()
    with redirect_stdout(stream), redirect_stderr(stream):
        try:
            do()
        except AssertionError as error:
            raise AssertionError(f"{error}; it printed:\n{stream.getvalue()}") from error
    return stream.getvalue()


def compare(shown: str, output: str) -> None:
    """Each shown line is a line of the output, spaces apart; "..." stands for anything."""
    printed = [" ".join(line.split()) for line in output.splitlines()]
    for line in shown.splitlines():
        pattern = ".*".join(re.escape(" ".join(part.split())) for part in line.split("..."))
        wanted = re.compile(re.sub(r"(?:\\ )?\.\*(?:\\ )?", ".*", pattern))
        assert any(wanted.fullmatch(found) for found in printed), f"not printed: {line}\n\n{output}"


def fragment(text: str) -> None:
    """Settings of a page, put into a small experiment. `stages` stands for the method."""
    given = read_yaml(text)
    base = {key: value for key, value in SMALL.items() if not (key == "method" and "stages" in given)}
    check(build(merged(base, given)))


def merged(base: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` over `base`, down to the settings of shards and sgd; a component is replaced as a whole."""
    deep = ("task", "federation", "shards", "work", "sgd")

    def joins(key: str, value: Any) -> bool:
        return key in deep and key in base and not (key == "work" and value.keys() != base[key].keys())

    return {**base, **{k: merged(base[k], v) if joins(k, v) else v for k, v in given.items()}}


def write(block: Block) -> None:
    path = Path(str(block.title))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(block.content, encoding="utf-8")


@pytest.fixture(scope="session")
def docs_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


PAGES = sorted(page for page in [ROOT / "README.md", *DOCS.rglob("*.md")] if any(True for _ in blocks(page)))


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_runs(
    page: Path, tmp_path: Path, docs_cache: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if "--engine '{ray:" in page.read_text("utf-8"):
        request.getfixturevalue("ray_actors")  # an actor joins the Ray of the other tests
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDLLM_CACHE", str(docs_cache))
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    for block in files(page):
        write(block)
    for block in files(page):
        if str(block.title).endswith(".yaml") and {"task", "federation"} <= read_yaml(block.content).keys():
            check(load(str(block.title)))
    runner = Runner(monkeypatch)
    for block in blocks(page):
        runner.run(block)
    for name in set(sys.modules) - before:  # a page's own modules are not the next page's
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_a_line_that_is_not_printed_is_found() -> None:
    compare("a  b\n...c\nd ... f", "a b\nxc\nd e f\n")
    for wrong in ("a", "b", "d e ... g"):
        with pytest.raises(AssertionError, match="not printed"):
            compare(wrong, "a b\nd e f\n")


def test_a_wrong_fragment_is_found() -> None:
    fragment("work: {sgd: {lr: 1}}")
    fragment("stages: [uniform]")
    for wrong in ("work: {sgd: {lrr: 1}}", "stages: [prox]", "method: fedavgg"):
        with pytest.raises(fedllm.errors.FedllmError):
            fragment(wrong)
