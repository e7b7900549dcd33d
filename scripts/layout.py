"""Print how the package hangs together; exit 1 where an import breaks the layers.

    python scripts/layout.py

A package is a folder or a file right below `fedllm`. It may import itself and packages of a strictly lower layer.
Imports inside functions and under TYPE_CHECKING count.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "fedllm"

# Lowest first. A new package is added here, in the lowest layer that it can live in.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "rng", "version"),
    ("events", "files", "tensors", "privacy"),
    ("messages", "models", "report"),
    ("data", "training", "stages", "aggregators"),
    ("evaluation",),
    ("experiment",),
    ("engines",),
    ("runs",),
    ("__init__", "cli"),
    ("__main__",),
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


@dataclass(frozen=True)
class Module:
    """One source file: dotted name, syntax tree, whether it is a package's `__init__`."""

    name: str
    source: ast.Module
    package: bool

    @property
    def top(self) -> str:
        """Its first name below `fedllm`."""
        return top_of(self.name)


def top_of(name: str) -> str:
    """`fedllm.stages.client_drift.prox` -> `stages`; `fedllm` itself -> `__init__`."""
    return name.partition(".")[2].split(".")[0] or "__init__"


def modules_of(sources: Mapping[str, str]) -> dict[str, Module]:
    """Modules by dotted name, from path below the folder that holds `fedllm` -> source."""
    found = {}
    for path, source in sources.items():
        parts = path.removesuffix(".py").split("/")
        package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if package else parts)
        found[name] = Module(name, ast.parse(source, path), package)
    return found


def read_package() -> dict[str, Module]:
    """The modules of fedllm."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return modules_of({path.relative_to(PACKAGE.parent).as_posix(): path.read_text("utf-8") for path in paths})


def imports_of(module: Module, modules: Mapping[str, Module]) -> Iterator[str]:
    """Dotted names that a module imports; of fedllm always a module, never a name inside of one."""
    nodes = list(ast.walk(module.source))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name != "fedllm" or alias.asname)
        elif isinstance(node, ast.ImportFrom):
            base = absolute(module, node)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in modules else base
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "fedllm":
            yield f"fedllm.{node.attr}" if f"fedllm.{node.attr}" in modules else "fedllm"


def absolute(module: Module, node: ast.ImportFrom) -> str:
    """The module that a `from` import names, its leading dots resolved."""
    if not node.level:
        return node.module or ""
    parts = module.name.split(".")
    kept = parts[: len(parts) - node.level + module.package]
    return ".".join([*kept, node.module] if node.module else kept)


def is_inside(name: str, package: str) -> bool:
    """True for the package itself and whatever is below it."""
    return name == package or name.startswith(f"{package}.")


def arrows(modules: Mapping[str, Module]) -> dict[str, set[str]]:
    """Of each module the other modules of fedllm that it imports."""
    return {
        name: {target for target in imports_of(module, modules) if target in modules and target != name}
        for name, module in modules.items()
    }


def layer_faults(modules: Mapping[str, Module]) -> Iterator[str]:
    """Packages without a layer, and imports that do not go down."""
    for module in modules.values():
        if module.top not in RANK:
            yield f"{module.name} has no layer: add '{module.top}' to LAYERS in scripts/layout.py."
            continue
        for target in sorted(set(imports_of(module, modules))):
            other = top_of(target)
            if not is_inside(target, "fedllm") or other not in RANK or other == module.top:
                continue
            if RANK[other] >= RANK[module.top]:
                yield f"{module.name} imports {target}, which is not below it."


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Circles of imports between files, one for each group that hangs together."""
    graph, found = {name: set(targets) for name, targets in graph.items()}, []
    while True:
        try:
            TopologicalSorter(graph).prepare()
            return found
        except CycleError as error:
            circle = list(error.args[1])
            found.append(circle)
            for name in circle:
                graph.pop(name, None)
            for targets in graph.values():
                targets -= set(circle)


def main() -> int:
    """Print the counts, then each fault."""
    modules = read_package()
    graph = arrows(modules)
    tops = {module.top for module in modules.values()}
    packages = {module.top for module in modules.values() if module.package and module.name.count(".") == 1}
    between = {(top_of(a), top_of(b)) for a, targets in graph.items() for b in targets if top_of(a) != top_of(b)}
    layers = len({RANK[top] for top in tops if top in RANK})
    found, faults = circles(graph), list(layer_faults(modules))
    print(
        f"{len(packages)} packages, {len(tops - packages)} files at the root, {layers} layers, {len(between)} imports "
        f"between packages, {len(faults)} not downwards, {len(found)} circles"
    )
    for line in [*faults, *(f"circle: {' -> '.join(circle)}" for circle in found)]:
        print(line)
    return 1 if faults or found else 0


if __name__ == "__main__":
    sys.exit(main())
