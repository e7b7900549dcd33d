"""The documentation stays true: its links lead somewhere, its commands parse, each public name has its page."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import typer
from typer.main import get_command

from fedllm.cli.main import app

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "fedllm" / "recipes"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"fedllm_docs_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = load(ROOT / "docs" / "gen_reference.py")


@dataclass(frozen=True)
class Text:
    """One page: its path below the project's root, and its Markdown."""

    path: Path
    markdown: str

    @property
    def blocks(self) -> list[tuple[str, str]]:
        """Fenced blocks: (what stands behind the fence, content)."""
        found = re.findall(r"^( *)(`{3,})([^\n]*)\n(.*?)^\1\2 *$", self.markdown, re.MULTILINE | re.DOTALL)
        return [(info.strip(), content) for _, _, info, content in found]

    @property
    def prose(self) -> str:
        """The page without its fenced blocks."""
        return re.sub(r"^( *)(`{3,})[^\n]*\n.*?^\1\2 *$", "", self.markdown, flags=re.MULTILINE | re.DOTALL)


def texts() -> list[Text]:
    paths = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
    return [Text(path.relative_to(ROOT), path.read_text("utf-8")) for path in paths]


def slugs(markdown: str) -> set[str]:
    """Anchors of the headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ +(.+?) *#*$", markdown, re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower())).strip("-") for heading in headings}


def link_faults(text: Text) -> Iterator[str]:
    """Relative links to files or headings that are not there."""
    generated = {ROOT / "docs" / "reference" / f"{name}.md" for name in reference.pages()}
    for target in re.findall(r"\]\(<?([^)\s>]+)>?(?: +\"[^\"]*\")?\)", re.sub(r"`[^`\n]*`", "", text.prose)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = Path(os.path.normpath(ROOT / text.path.parent / name))
        if name and path not in generated and not path.exists():
            yield f"{text.path} links to {target}, which does not exist"
        elif anchor and not name and anchor not in slugs(text.markdown):
            yield f"{text.path} links to {target}, but has no such heading"
        elif anchor and path.suffix == ".md" and path.exists() and anchor not in slugs(path.read_text("utf-8")):
            yield f"{text.path} links to {target}, but {path.name} has no such heading"


def commands(block: str) -> Iterator[list[str]]:
    """The words of each command in a block of bash; comments, variables and joins are taken off."""
    for line in block.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("&|;<>"):
                while words and re.match(r"\w+=", words[0]):
                    words = words[1:]
                if words:
                    yield words
                words = []
            else:
                words.append(word)


def parse(arguments: list[str]) -> str:
    """Why fedllm's command line would refuse these arguments; "" where it would not. Nothing is run."""
    command = get_command(app)
    try:
        context = command.make_context("fedllm", list(arguments) or ["--help"])
        name, verb, rest = command.resolve_command(context, list(arguments))
        verb.make_context(name, rest, parent=context)
    except typer.Exit:
        return ""  # --help
    except Exception as error:  # the command line's own, of several types
        return str(error) or type(error).__name__
    return ""


def command_faults(text: Text) -> Iterator[str]:
    """Commands that fedllm would refuse, recipes that are not packaged, commands that no test would see."""
    written = shown_files(text)
    for info, content in text.blocks:
        if info.split(" ")[0] == "text":  # what a command prints; tests/test_docs_run.py compares it
            continue
        if info.split(" ")[0] != "bash":
            if re.search(r"^ *\$? *(\.venv/bin/)?fedllm [a-z]", content, re.MULTILINE):
                yield f"{text.path} shows a fedllm command in a block that is not marked as bash"
            continue
        for words in commands(content):
            if Path(words[0]).name != "fedllm":
                continue
            if fault := parse(words[1:]):
                yield f"{text.path}: `{' '.join(words)}`: {fault}"
            named = "--help" in words or experiment_exists(words[2:], written)
            if words[1:2] in (["run"], ["check"]) and not named:
                yield f"{text.path}: `{' '.join(words)}` names no packaged recipe, file, or block with that title"
    for verb in re.findall(r"`fedllm ([a-z][\w-]*)", text.prose):
        if fault := parse([verb, "--help"]):
            yield f"{text.path} names `fedllm {verb}`: {fault}"


def shown_files(text: Text) -> list[str]:
    """Files that a page shows, and those of the pages that it names by `<!-- files: PAGE -->`."""
    found = re.findall(r"^```ya?ml .*title=\"([^\"]+)\"", text.markdown, re.MULTILINE)
    for name in re.findall(r"<!-- files: ([\w./-]+) -->", text.markdown):
        path = text.path.parent / name
        found += shown_files(Text(path, (ROOT / path).read_text("utf-8")))
    return found


def experiment_exists(words: list[str], written: list[str]) -> bool:
    """Whether one of the words is a packaged recipe, a file of the project or of a run, or one that the page shows."""
    known = {*written, "RUN/experiment.yaml"}
    return any(w in known or (ROOT / w).is_file() or (RECIPES / f"{w}.yaml").is_file() for w in words)


def script_faults(text: Text) -> Iterator[str]:
    """Scripts that are named and do not exist."""
    for name in sorted(set(re.findall(r"(?<![\w/.-])(?:scripts|benchmarks|\.ci)/\w[\w./-]*\w", text.markdown))):
        if not (ROOT / name).exists():
            yield f"{text.path} names {name}, which does not exist"


def test_links_lead_somewhere() -> None:
    assert [fault for text in texts() for fault in link_faults(text)] == []


def test_commands_parse_and_their_recipes_exist() -> None:
    assert [fault for text in texts() for fault in command_faults(text)] == []


def test_named_scripts_exist() -> None:
    assert [fault for text in texts() for fault in script_faults(text)] == []


BAD_PAGE = """\
# A heading: it's here

[good](docs/index.md) [good](#a-heading-its-here) [code](LICENSE "title") `[not](a-link.md)`
[gone](docs/nowhere.md) [gone](docs/index.md#nowhere) [gone](#nowhere) [host](https://example.com/nowhere)
[generated](docs/reference/tensors.md)

`fedllm frobnicate` but `fedllm run`, scripts/nothing and (scripts/check).

```bash
pip install x && A=1 fedllm run no-such-recipe rounds=3   # comment
fedllm run --out \\
    here also.yaml rounds=3 | cat
fedllm check also.yaml; fedllm run --help
echo fedllm nonsense
fedllm frobnicate
fedllm run --frob also.yaml
fedllm
```

```yaml title="also.yaml"
rounds: 1
```

```console
$ fedllm run also.yaml
```
"""


def test_faults_of_a_bad_page_are_found() -> None:
    text = Text(Path("BAD.md"), BAD_PAGE)
    assert list(link_faults(text)) == [
        "BAD.md links to docs/nowhere.md, which does not exist",
        "BAD.md links to docs/index.md#nowhere, but index.md has no such heading",
        "BAD.md links to #nowhere, but has no such heading",
    ]
    assert list(script_faults(text)) == ["BAD.md names scripts/nothing, which does not exist"]
    expected = (
        "`fedllm run no-such-recipe rounds=3` names no packaged recipe",
        "`fedllm frobnicate`: No such command",
        "`fedllm run --frob also.yaml`: No such option",
        "in a block that is not marked as bash",
        "names `fedllm frobnicate`: No such command",
    )
    found = list(command_faults(text))
    assert len(found) == len(expected), found
    assert [part for part, fault in zip(expected, found, strict=True) if part not in fault] == [], found


def test_commands_are_taken_apart() -> None:
    block = "A=1 B=2 fedllm run a 'b c' > out && x; y | z  # no\n\n# nothing\nfedllm \\\n  check d\n"
    assert list(commands(block)) == [
        ["fedllm", "run", "a", "b c"],
        ["out"],
        ["x"],
        ["y"],
        ["z"],
        ["fedllm", "check", "d"],
    ]


def test_each_public_name_has_a_docstring_on_a_page() -> None:
    pages = {module for modules in reference.pages().values() for module in modules}
    for name, target in reference.public_names().items():
        if name == "__version__":
            continue
        module = target.rpartition(".")[0]
        assert module in pages, f"{name} is defined in {module}, which has no page in the reference"
        source = reference.file_of(reference.PACKAGE, module).read_text("utf-8")
        assert documented(source, target.rpartition(".")[2]), f"{target} has no docstring"


def documented(source: str, name: str) -> bool:
    """Whether a class or function of a file has a docstring; a plain value needs none."""
    kinds = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    nodes = [node for node in ast.parse(source).body if isinstance(node, kinds) and node.name == name]
    return all(ast.get_docstring(node) for node in nodes)


def argument_faults(source: str, path: str) -> Iterator[str]:
    """Names under `Args:` that the function or class below does not take."""
    for node in ast.walk(ast.parse(source, path)):
        if isinstance(node, ast.ClassDef):
            taken = {item.target.id for item in node.body if isinstance(item, ast.AnnAssign)}
            taken |= {name for item in node.body if is_function(item, "__init__") for name in parameters(item)}
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            taken = parameters(node)
        else:
            continue
        section = re.search(r"^Args:\n((?:    .*\n?|\n)*)", ast.get_docstring(node) or "", re.MULTILINE)
        for names in re.findall(r"^    ([\w*][\w*, ]*?)(?: \(.*?\))?:", section[1] if section else "", re.MULTILINE):
            for name in names.split(","):
                if name.strip(" *") not in taken:
                    yield f"{path}:{node.lineno} {node.name} documents '{name.strip()}', which it does not take"


def is_function(node: ast.stmt, name: str) -> bool:
    return isinstance(node, ast.FunctionDef) and node.name == name


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    return {arg.arg for arg in ast.walk(node.args) if isinstance(arg, ast.arg)}


def test_documented_arguments_exist() -> None:
    paths = sorted((ROOT / "fedllm").rglob("*.py"))
    found = [fault for path in paths for fault in argument_faults(path.read_text("utf-8"), path.name)]
    assert found == []


def test_documented_arguments_that_do_not_exist_are_found() -> None:
    source = """\
class Thing:
    '''A thing.

    Args:
        size, colour: fields. shape: of it.
        weight: none.
    '''

    size: int
    colour: str

    def f(self, a, *, b, **more):
        '''Do.

        Args:
            a (int): one,
                with: a second line.
            c, b: two.

        Returns:
            d: nothing.
        '''
"""
    assert list(argument_faults(source, "a.py")) == [
        "a.py:1 Thing documents 'weight', which it does not take",
        "a.py:12 f documents 'c', which it does not take",
    ]


def test_reference_follows_names_to_their_definition(tmp_path: Path) -> None:
    package = tmp_path / "thing"
    for path, source in {
        "__init__.py": "from thing.inner import A as B\nfrom thing.plain import f\n__all__ = ['B', 'f', 'g']\ng = 1",
        "plain.py": "def f(): ...",
        "_private.py": "",
        "inner/__init__.py": "from thing.inner.deep import A",
        "inner/deep.py": "class A: ...",
        "inner/_hidden.py": "",
    }.items():
        (package / path).parent.mkdir(parents=True, exist_ok=True)
        (package / path).write_text(source)
    assert reference.public_names(package) == {"B": "thing.inner.deep.A", "f": "thing.plain.f", "g": "thing.g"}
    assert reference.pages(package) == {"inner": ["thing.inner", "thing.inner.deep"], "plain": ["thing.plain"]}
    assert not documented("def f(): ...", "f")


@pytest.mark.slow
def test_site_builds_strictly_and_asks_no_other_host(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    html = "\n".join(path.read_text("utf-8") for path in (tmp_path / "site").rglob("*.html"))
    assert "fedllm.tensors.tree" in html
    assert re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*(?:src|href)=\"?(?:https?:)?//[^>]*>", html) == []
