"""The project's own files agree with each other: dependencies, exact versions, scripts, packaging."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
SCRIPTS = ("scripts/install", "scripts/peers", "scripts/quickstart", "scripts/check", "scripts/test", ".ci/run")

# Names to import that are not the name of the distribution, and what comes with a declared dependency.
DISTRIBUTION = {
    "yaml": "pyyaml",
    "huggingface_hub": "transformers",
    "jinja2": "torch",
    "tokenizers": "transformers",
    "click": "typer",
    "pydantic_core": "pydantic",
}


def pins(text: str) -> dict[str, Version]:
    """Distribution -> exact version; a line that pins nothing is an error."""
    found = {}
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            name, version = line.split("==")
            found[canonicalize_name(name)] = Version(version)
    return found


def requirement_faults(requirements: list[str], pinned: dict[str, Version]) -> Iterator[str]:
    """Requirements without a lower or an upper bound, without an exact version, or with one out of bounds."""
    for requirement in map(Requirement, requirements):
        operators = {clause.operator for clause in requirement.specifier}
        version = pinned.get(canonicalize_name(requirement.name))
        if not ({">=", "=="} & operators and {"<", "=="} & operators):
            yield f"{requirement} needs a lower and an upper bound in pyproject.toml"
        if version is None:
            yield f"{requirement.name} has no exact version in constraints.txt"
        elif version not in requirement.specifier:
            yield f"{requirement} excludes {version}, its version in constraints.txt"


def third_party(source: str) -> set[str]:
    """Distributions that a file imports, the standard library and fedllm left out."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return {canonicalize_name(DISTRIBUTION.get(name, name)) for name in names - sys.stdlib_module_names - {"fedllm"}}


def test_each_dependency_is_bounded_and_pinned() -> None:
    pinned = pins((ROOT / "constraints.txt").read_text("utf-8"))
    requirements = [*PROJECT["dependencies"], *(item for extra in EXTRAS.values() for item in extra)]
    assert len(requirements) > 10
    assert list(requirement_faults(requirements, pinned)) == []


def test_peers_have_exact_versions_and_the_same_torch() -> None:
    ours, peers = (pins((ROOT / name).read_text("utf-8")) for name in ("constraints.txt", "constraints-peers.txt"))
    assert {"flwr", "ray", "trl", "peft", "transformers", "torch", "datasets"} <= peers.keys()
    assert peers["torch"] == ours["torch"]


def test_bad_requirements_are_found() -> None:
    pinned = pins("# comment\na==1.0\n\nb==2.0\n")
    assert list(requirement_faults(["a>=1,<2"], pinned)) == []
    assert "lower and an upper" in next(requirement_faults(["a>=1"], pinned))
    assert "lower and an upper" in next(requirement_faults(["a<2"], pinned))
    assert "excludes 2.0" in next(requirement_faults(["B>=1,<2"], pinned))
    assert "no exact version" in next(requirement_faults(["c>=1,<2"], pinned))
    with pytest.raises(ValueError):
        pins("a>=1")


def test_each_import_is_a_declared_dependency() -> None:
    declared = [
        *PROJECT["dependencies"],
        *(item for name, extra in EXTRAS.items() if name not in ("dev", "docs") for item in extra),
    ]
    known = {canonicalize_name(Requirement(item).name) for item in declared}
    used = {path: third_party(path.read_text("utf-8")) for path in sorted((ROOT / "fedllm").rglob("*.py"))}
    assert any(used.values())
    assert {str(path): names - known for path, names in used.items() if names - known} == {}


def test_undeclared_imports_are_found() -> None:
    source = (
        "import os, a_b.c\nfrom yaml import safe_load\nfrom . import x\nfrom fedllm import t\ndef f():\n    import d\n"
    )
    assert third_party(source) == {"a-b", "pyyaml", "d"}


def test_version_has_a_section_in_the_changelog() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert PROJECT["version"] in headings
    assert len(headings) == len(set(headings))


def test_package_says_the_same_version() -> None:
    found = re.findall(r'^__version__ = "(.+)"$', (ROOT / "fedllm" / "version.py").read_text("utf-8"), re.MULTILINE)
    assert found == [PROJECT["version"]]


def test_licence_is_whole_and_named() -> None:
    text = (ROOT / "LICENSE").read_text("utf-8")
    assert PROJECT["license"] == "Apache-2.0"
    assert "9. Accepting Warranty or Additional Liability" in text
    assert "Copyright 2026 The fedllm authors" in text
    assert all((ROOT / name).is_file() for name in PROJECT["license-files"])


def test_package_says_that_it_is_typed() -> None:
    assert (ROOT / "fedllm" / "py.typed").is_file()


def test_recipes_are_mappings_of_safe_yaml() -> None:
    recipes = {path.stem: path for path in (ROOT / "fedllm" / "recipes").glob("*.yaml")}
    assert "quickstart" in recipes, "scripts/quickstart runs it"
    loaded = {name: yaml.safe_load(path.read_text("utf-8")) for name, path in recipes.items()}
    assert [name for name, settings in loaded.items() if not isinstance(settings, dict)] == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_is_executable_and_parses(name: str) -> None:
    assert os.access(ROOT / name, os.X_OK)
    subprocess.run(["bash", "-n", str(ROOT / name)], check=True)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with the scripts and nothing to install, and a `python3` that is too old."""
    for name in ("pyproject.toml", "constraints.txt", "constraints-peers.txt"):
        (tmp_path / name).write_text("")
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    return tmp_path


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    return path


def install(clone: Path, *extras: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{clone / 'bin'}:/usr/bin:/bin" if "PATH" not in environment else environment.pop("PATH")
    return subprocess.run(
        ["/bin/bash", str(clone / "scripts" / "install"), *extras],
        env={"PATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_install_names_the_python_that_is_missing(clone: Path) -> None:
    old = program(clone / "bin" / "old", "exit 1")
    result = install(clone, PYTHON=str(old))
    assert result.returncode == 1
    assert f"PYTHON={old} is not a Python from 3.11 to 3.13" in result.stderr
    program(clone / "bin" / "dirname", '/usr/bin/dirname "$@"')
    result = install(clone, PATH=str(clone / "bin"))
    assert result.returncode == 1
    assert "fedllm needs Python 3.11, 3.12 or 3.13" in result.stderr


def test_install_names_the_module_that_is_missing(clone: Path) -> None:
    bare = program(clone / "bin" / "bare", 'case "$*" in *ensurepip*) exit 1;; esac')
    result = install(clone, PYTHON=str(bare))
    assert result.returncode == 1
    assert "python3-venv" in result.stderr


def stub_venv(clone: Path, install: str) -> None:
    """A `.venv/bin/python` that runs `-c` for real, has pip, and does `install` for `-m pip install`."""
    real = f'exec {shlex.quote(sys.executable)} -I -S "$@"'
    cases = f'"-m pip install "*) {install};; "-m pip "*) ;; "-c "*) {real};; *) exit 9;;'
    program(clone / ".venv" / "bin" / "python", f'case "$*" in {cases} esac')


def test_install_runs_once_for_each_extra_and_again_when_files_change(clone: Path) -> None:
    calls = clone / "calls"
    stub_venv(clone, f'echo "${{@: -1}}" >> {calls}')
    for extras in (["data"], ["data"], [], ["data", "dev"], ["data", "dev"]):
        assert install(clone, *extras).returncode == 0
    assert calls.read_text().split() == [".[data]", ".[data,dev]"]
    (clone / "constraints.txt").write_text("rich==14.3.4\n")
    for extras in (["dev"], ["dev"], []):
        assert install(clone, *extras).returncode == 0
    assert calls.read_text().split() == [".[data]", ".[data,dev]", ".[dev]"]


def test_install_is_not_done_after_a_failure(clone: Path) -> None:
    stub_venv(clone, "exit 3")
    assert install(clone).returncode == 3
    assert install(clone).returncode == 3


def test_peers_are_installed_once_and_again_when_their_versions_change(clone: Path) -> None:
    calls = clone / "calls"
    stub_venv(clone, f'echo "$@" >> {calls}')
    shutil.copytree(clone / ".venv", clone / ".venv-peers")
    for text in ("torch==1\n", "torch==1\n", "torch==2\n"):
        (clone / "constraints-peers.txt").write_text(text)
        done = subprocess.run(["/bin/bash", str(clone / "scripts" / "peers")], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    ours, *peers = calls.read_text().splitlines()
    assert "--constraint constraints.txt" in ours
    assert len(peers) == 2
    assert all("--constraint constraints-peers.txt" in call and "flwr[simulation]" in call for call in peers)
