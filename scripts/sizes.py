"""Print how large the files and functions of a folder are; exit 1 where one is larger than the caps.

    python scripts/sizes.py [FOLDER] [--quiet]

Lines of a file are all its lines. Lines of a function run from `def` to its last line without its docstring; an inner
function counts by itself and within the outer one. Parameters are all that a caller may name, without `self` and `cls`.
"""

from __future__ import annotations

import argparse
import ast
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

MAX_FILE_LINES = 400
MAX_PARAMETERS = 8
MAX_P90_LINES = 35


@dataclass(frozen=True)
class Function:
    """One function: its place (`path:line name`), lines and parameters."""

    place: str
    lines: int
    parameters: int


@dataclass(frozen=True)
class Sizes:
    """Lines of each file, and all functions, below one folder."""

    files: dict[str, int]
    functions: tuple[Function, ...]

    @property
    def p90(self) -> int:
        """Nearest rank: at least nine functions in ten are at most this long; 0 without functions."""
        lengths = sorted(function.lines for function in self.functions)
        return lengths[-(-9 * len(lengths) // 10) - 1] if lengths else 0


def functions_of(source: str, path: str) -> list[Function]:
    """Every function of one file, methods and inner functions included."""
    found = []
    for node in ast.walk(ast.parse(source, path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            place = f"{path}:{node.lineno} {node.name}"
            found.append(Function(place, _lines(node), len(_parameters(node.args))))
    return found


def _lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert node.end_lineno is not None
    whole = node.end_lineno - node.lineno + 1
    if ast.get_docstring(node) is None:
        return whole
    docstring = node.body[0]
    assert docstring.end_lineno is not None
    return whole - (docstring.end_lineno - docstring.lineno + 1)


def _parameters(args: ast.arguments) -> list[str]:
    named = [arg.arg for arg in (*args.posonlyargs, *args.args)]
    if named and named[0] in ("self", "cls"):
        named = named[1:]
    stars = [arg.arg for arg in (args.vararg, args.kwarg) if arg is not None]
    return named + [arg.arg for arg in args.kwonlyargs] + stars


def measure(folder: Path) -> Sizes:
    """Read all Python files below `folder`."""
    files: dict[str, int] = {}
    functions: list[Function] = []
    for path in sorted(folder.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        name = path.relative_to(folder.parent).as_posix()
        files[name] = len(source.splitlines())
        functions += functions_of(source, name)
    return Sizes(files, tuple(functions))


def faults(sizes: Sizes) -> list[str]:
    """One sentence for each cap that is broken."""
    found = [
        f"{path} has {lines} lines, more than {MAX_FILE_LINES}: split it by what it is about."
        for path, lines in sizes.files.items()
        if lines > MAX_FILE_LINES
    ]
    found += [
        f"{function.place} has {function.parameters} parameters, more than {MAX_PARAMETERS}: group them."
        for function in sizes.functions
        if function.parameters > MAX_PARAMETERS
    ]
    if sizes.p90 > MAX_P90_LINES:
        found.append(f"One function in ten is longer than {sizes.p90 - 1} lines; the cap is {MAX_P90_LINES}.")
    return found


def table(sizes: Sizes, longest: int = 10) -> str:
    """All files from the largest to the smallest, the longest functions, and the totals."""
    by_lines = sorted(sizes.files.items(), key=lambda item: (-item[1], item[0]))
    by_length = sorted(sizes.functions, key=lambda function: (-function.lines, function.place))[:longest]
    rows = [f"{lines:6d}  {path}" for path, lines in by_lines]
    rows += ["", "longest functions:"]
    rows += [f"{function.lines:6d}  {function.place}" for function in by_length]
    middle = median(sizes.files.values()) if sizes.files else 0
    rows += [
        "",
        f"{len(sizes.files)} files, {sum(sizes.files.values())} lines, median file {middle:g};"
        f" {len(sizes.functions)} functions, p90 {sizes.p90} lines",
    ]
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> int:
    """Print the table and the broken caps; 1 if there is one."""
    parser = argparse.ArgumentParser(description="Sizes of files and functions, with caps.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).resolve().parent.parent / "fedllm")
    parser.add_argument("--quiet", action="store_true", help="print the broken caps only")
    options = parser.parse_args(arguments)
    sizes = measure(options.folder)
    if not options.quiet:
        print(table(sizes))
    broken = faults(sizes)
    print(*broken, sep="\n", end="\n" if broken else "", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
