"""The reference: one page for each module of fedllm, written from its docstrings whenever the site is built.

MkDocs runs this file as a hook. A module or package whose name starts with an underscore is private and has no page.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

PACKAGE = Path(__file__).resolve().parent.parent / "fedllm"
INDEX = "reference/index.md"


def pages(package: Path = PACKAGE) -> dict[str, list[str]]:
    """First name below the package -> the dotted names of its public modules, the package's own first."""
    found: dict[str, list[str]] = {}
    for path in sorted(package.rglob("*.py"), key=lambda path: (path.parent, path.name != "__init__.py", path.name)):
        parts = path.relative_to(package).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if parts and not any(part.startswith("_") for part in parts):
            found.setdefault(parts[0], []).append(".".join((package.name, *parts)))
    return dict(sorted(found.items()))


def public_names(package: Path = PACKAGE) -> dict[str, str]:
    """Each name in `__all__` of the package -> the dotted name of its definition."""
    path = package / "__init__.py"
    if not path.exists():
        return {}
    return {name: definition(package, path, name) for name in _exported(ast.parse(path.read_text("utf-8")))}


def definition(package: Path, path: Path, name: str) -> str:
    """Where the name of one file is defined: follows `from ... import ...` through the files of the package."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):  # names for type checkers only count too
        if isinstance(node, ast.ImportFrom) and not node.level and node.module:
            for alias in node.names:
                if name == (alias.asname or alias.name):
                    source = file_of(package, node.module)
                    return definition(package, source, alias.name) if source else f"{node.module}.{alias.name}"
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join((*(parts[:-1] if parts[-1] == "__init__" else parts), name))


def file_of(package: Path, module: str) -> Path | None:
    """The file of a module of the package; None for any other module."""
    stem = package.parent.joinpath(*module.split("."))
    candidates = (stem / "__init__.py", stem.with_suffix(".py"))
    return next((path for path in candidates if path.exists() and module.split(".")[0] == package.name), None)


def first_line(module: str, package: Path = PACKAGE) -> str:
    """The first line of a module's docstring."""
    path = file_of(package, module)
    text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) if path else None
    return (text or "").partition("\n")[0]


def _exported(tree: ast.Module) -> list[str]:
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            return list(ast.literal_eval(node.value))
    return []


def on_config(config: MkDocsConfig) -> None:
    """Add the pages to the navigation."""
    for entry in config.nav or []:
        for inner in entry.get("Reference", []) if isinstance(entry, dict) else []:
            if isinstance(inner, dict) and "Modules" in inner:
                inner["Modules"] = [{name: f"reference/{name}.md"} for name in pages()]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Make the pages."""
    from mkdocs.structure.files import File

    for name, modules in pages().items():
        content = f"# {name}\n\n" + "\n\n".join(f"::: {module}" for module in modules) + "\n"
        files.append(File.generated(config, f"reference/{name}.md", content=content))


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """List the public names below the text of the reference's first page."""
    if page.file.src_uri != INDEX:
        return markdown
    names = [f"- [`{name}`][{target}]" for name, target in sorted(public_names().items())]
    modules = [f"- [`{found[0]}`]({name}.md): {first_line(found[0])}" for name, found in pages().items()]
    sections = [markdown, "## Modules", "\n".join(modules)]
    if names:
        sections[1:1] = ["## Names of `fedllm` itself", "\n".join(names)]
    return "\n\n".join(sections) + "\n"
