"""The import contract: which module of fedllm may import which, read from the source without running it.

A module is named by its first name below `fedllm`: `fedllm.stages.prox` is `stages`; unless the list of layers names it
with its folder, as `engines.ray`. It may import modules of its own
layer or of a lower one. Imports inside functions and under TYPE_CHECKING count.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "fedllm"

# Lowest first. A new module is added here, in the lowest layer that it can live in.
LAYERS: tuple[tuple[str, ...], ...] = (
    (
        "places",
        "bundle",
        "tree",
        "rng",
        "errors",
        "packing",
        "factors",
        "shift",
        "sparse",
        "tensorfile",
        "events",
        "cache",
        "checksum",
        "damage",
        "disk",
        "jsontext",
        "system",
        "ranges",
        "data",
        "yamltext",
        "recent",
        "heap",
        "native",
    ),
    ("privacy", "secagg"),
    ("update", "batch"),
    ("stage", "work", "aggregate", "moments", "weights", "federation", "blocks", "diagnostics"),
    ("stages", "works", "aggregators", "federations", "tasks"),
    ("experiment",),
    ("evaluation",),
    (
        *(
            "asked",
            "loop",
            "advice",
            "check",
            "check_controls",
            "check_shapes",
            "client",
            "site_shift",
            "state",
            "wire",
        ),
        "engine",
    ),
    ("engines",),
    # What starts clients in another process hands it text, which is read there: `host`, and the engine that does so.
    ("config", "catalog", "presets", "schema", "spec", "overrides", "host", "engines.ray"),
    (
        *("folder", "lock", "ledger", "best", "outputs", "compare", "observer", "session", "finished", "rehearsal"),
        *("launch", "export", "inputs", "further"),
    ),
    ("report", "audits", "explain"),
    ("__init__",),
    ("console",),
    ("cli",),
    ("__main__",),
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}

# importer -> what it must not import, whatever the layers say. Only the `__init__` of stages may name stages.
FORBIDDEN = {"tasks": {"federations"}, "federations": {"tasks"}, "stages": {"stages"}}
ENTRANCES = {"cli": {"cli", "__main__"}, "console": {"console", "cli"}}  # module -> its only importers
WITHOUT = {"privacy": {"torch"}, "secagg": {"torch", "fedllm.stages"}}  # not even through another file

# Optional or heavy packages: each is imported in one file, or nowhere outside of the folder named here.
SINGLE_FILE = {"datasets", "flwr", "flwr_datasets", "nvflare", "plotly", "pyarrow", "ray"}
SINGLE_FOLDER = {"peft": "tasks"}

CODE_LOADERS = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
UNSAFE_CALLS = {
    *("eval", "exec", "builtins.eval", "builtins.exec", "torch.load", "torch.serialization.load", "torch.jit.load"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.unsafe_load_all"),
    *("yaml.full_load_all", "yaml.UnsafeLoader", "yaml.FullLoader", "yaml.Loader"),
}
UNSAFE_FLAGS = {"trust_remote_code", "allow_pickle"}


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
    """`fedllm.stages.prox` -> `stages`; `fedllm` itself -> `__init__`; what LAYERS lists with its folder -> that."""
    _, _, inner = name.partition(".")
    return inner if inner in RANK else inner.split(".")[0] or "__init__"


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
    paths = sorted(PACKAGE.rglob("*.py"))
    return modules_of({path.relative_to(PACKAGE.parent).as_posix(): path.read_text("utf-8") for path in paths})


def imports_of(module: Module, modules: Mapping[str, Module]) -> Iterator[str]:
    """Dotted names that a module imports; of fedllm always a module, never a name inside of one.

    The version is not counted: every module may read `fedllm.__version__`.
    """
    nodes = list(ast.walk(module.source))
    roots = [node for node in nodes if isinstance(node, ast.Attribute) and dotted(node.value, {}) == "fedllm"]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name != "fedllm" or alias.asname)
        elif isinstance(node, ast.ImportFrom):
            base = absolute(module, node)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                if inner != "fedllm.__version__":
                    yield inner if inner in modules else base
    for root in roots:
        if root.attr != "__version__":
            yield f"fedllm.{root.attr}" if f"fedllm.{root.attr}" in modules else "fedllm"


def absolute(module: Module, node: ast.ImportFrom) -> str:
    """The module that a `from` import names, its leading dots resolved."""
    if not node.level:
        return node.module or ""
    parts = module.name.split(".")
    kept = parts[: len(parts) - node.level + module.package]
    return ".".join([*kept, node.module] if node.module else kept)


def is_inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def layer_faults(modules: Mapping[str, Module]) -> Iterator[str]:
    """Modules without a layer, imports upwards, and pairs that must not meet."""
    for module in modules.values():
        if module.top not in RANK:
            yield f"{module.name} has no layer: add '{module.top}' to LAYERS in tests/test_imports.py."
            continue
        for target in sorted(set(imports_of(module, modules))):
            if not is_inside(target, "fedllm") or top_of(target) not in RANK:
                continue
            other = top_of(target)
            if RANK[other] > RANK[module.top]:
                yield f"{module.name} imports {target}, which is above it."
            if other in FORBIDDEN.get(module.top, ()) and module.name != f"fedllm.{other}":
                yield f"{module.name} imports {target}; {module.top} must not import {other}."
            if module.top not in ENTRANCES.get(other, {module.top}):
                yield f"{module.name} imports {target}; only {', '.join(sorted(ENTRANCES[other]))} may."


def closure(start: str, modules: Mapping[str, Module]) -> set[str]:
    """All that a module needs, through other files of fedllm. The `__init__` of `fedllm` is left out."""
    seen = {"fedllm"}
    todo = [start]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo.append(name.rpartition(".")[0])  # its package's `__init__` runs first
            if name in modules:
                todo += imports_of(modules[name], modules)
    return seen


def purity_faults(modules: Mapping[str, Module]) -> Iterator[str]:
    """Modules that reach what they must do without."""
    for module in modules.values():
        for banned in sorted(WITHOUT.get(module.top, ())):
            if any(is_inside(name, banned) for name in closure(module.name, modules)):
                yield f"{module.name} needs {banned}; {module.top} must do without."


def dependency_faults(modules: Mapping[str, Module]) -> Iterator[str]:
    """Optional packages that are imported in more than one file, or outside of their folder."""
    for package in sorted(SINGLE_FILE | set(SINGLE_FOLDER)):
        users = [
            module
            for module in modules.values()
            if any(is_inside(name, package) for name in imports_of(module, modules))
        ]
        if package in SINGLE_FILE and len(users) > 1:
            yield f"{package} is imported in {len(users)} files, one is allowed: {', '.join(m.name for m in users)}."
        folder = SINGLE_FOLDER.get(package)
        yield from (f"{m.name} imports {package}; only {folder} may." for m in users if folder and m.top != folder)


def dotted(node: ast.expr, known_as: Mapping[str, str]) -> str:
    """`a.b.c` with import aliases resolved; "" for what is not a dotted name."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([known_as.get(node.id, node.id), *reversed(parts)]) if isinstance(node, ast.Name) else ""


def called(node: ast.Call, known_as: Mapping[str, str]) -> str:
    """The dotted name of what is called; "" for a call on a value."""
    return dotted(node.func, known_as)


def aliases_of(module: Module) -> dict[str, str]:
    """Local name -> dotted name of what it was imported as."""
    found = {}
    for node in ast.walk(module.source):
        if isinstance(node, ast.Import):
            found |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: f"{absolute(module, node)}.{alias.name}" for alias in node.names}
    return found


def safety_faults(modules: Mapping[str, Module]) -> Iterator[str]:
    """Whatever could run code that was received or read."""
    for module in modules.values():
        for name in sorted(set(imports_of(module, modules))):
            if name.split(".")[0] in CODE_LOADERS:
                yield f"{module.name} imports {name}, which can run what it reads."
        known_as = aliases_of(module)
        for node in ast.walk(module.source):
            if isinstance(node, ast.Call) and called(node, known_as) in UNSAFE_CALLS and not loads_safely(node, module):
                yield f"{module.name}:{node.lineno} calls {called(node, known_as)}, which can run what it reads."
            for flag, value in flags_of(node):
                if flag in UNSAFE_FLAGS and not (isinstance(value, ast.Constant) and value.value is False):
                    yield f"{module.name}:{value.lineno} sets {flag} to something else than False."


def loads_safely(call: ast.Call, module: Module) -> bool:
    """`yaml.load(text, Loader)` whose loader is yaml.SafeLoader or a class of the same file that extends it alone."""
    known_as = aliases_of(module)
    loaders = {"yaml.SafeLoader", "yaml.CSafeLoader"}
    for node in ast.walk(module.source):
        if isinstance(node, ast.ClassDef) and [dotted(base, known_as) for base in node.bases] == ["yaml.SafeLoader"]:
            loaders.add(node.name)
    given = [*call.args[1:2], *(keyword.value for keyword in call.keywords if keyword.arg == "Loader")]
    return called(call, known_as) == "yaml.load" and [dotted(node, known_as) in loaders for node in given] == [True]


def flags_of(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Keyword arguments and string keys of a dictionary, with their values."""
    if isinstance(node, ast.keyword) and node.arg is not None:
        yield node.arg, node.value
    elif isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                yield key.value, value


def faults(modules: Mapping[str, Module]) -> list[str]:
    """Every sentence about a broken rule."""
    rules = (layer_faults, purity_faults, dependency_faults, safety_faults)
    return [sentence for rule in rules for sentence in rule(modules)]


def test_package_keeps_the_contract() -> None:
    modules = read_package()
    assert len(modules) > 5, "no source was found"
    assert faults(modules) == []


def test_every_folder_with_code_is_a_package() -> None:
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert sorted(str(folder) for folder in folders if not (folder / "__init__.py").exists()) == []


def test_layers_name_each_module_once() -> None:
    names = [name for layer in LAYERS for name in layer]
    assert len(names) == len(set(names))


BAD = {
    "upwards": (
        {"fedllm/tensors/tree.py": "from fedllm import stage", "fedllm/stages/base.py": ""},
        "fedllm.stages.base, which is above",
    ),
    "upwards inside a function": (
        {"fedllm/messages/update.py": "def f():\n    from fedllm.stages.prox import Prox"},
        "fedllm.stages.client_drift.prox, which is above",
    ),
    "upwards by dots": (
        {"fedllm/stages/client_drift/prox.py": "from ..loop import run"},
        "fedllm.runs.server_round, which is above",
    ),
    "upwards from a package": ({"fedllm/stages/__init__.py": "from ..engines import run"}, "engines, which is above"),
    "the root by attribute": (
        {"fedllm/runs/server_round.py": "import fedllm\nfedllm.run(1)"},
        "imports fedllm, which is above",
    ),
    "the root": (
        {"fedllm/runs/server_round.py": "from fedllm import run", "fedllm/__init__.py": ""},
        "fedllm, which is above",
    ),
    "stage to stage": (
        {
            "fedllm/stages/client_drift/prox.py": "from fedllm.stages.dyn import Dyn",
            "fedllm/stages/client_drift/dyn.py": "",
        },
        "stages must not import stages",
    ),
    "stage to stage through the package": (
        {"fedllm/stages/client_drift/prox.py": "from fedllm.stages import Dyn", "fedllm/stages/__init__.py": ""},
        "stages must not import stages",
    ),
    "task to federation": (
        {"fedllm/models/task.py": "import fedllm.federations.shards"},
        "must not import federations",
    ),
    "federation to task": ({"fedllm/federations/a.py": "from fedllm.tasks import x"}, "must not import tasks"),
    "cli": ({"fedllm/console/page.py": "import fedllm.cli.main"}, "only __main__, cli may"),
    "console": ({"fedllm/__main__.py": "import fedllm.console"}, "only cli, console may"),
    "no layer": ({"fedllm/novelty.py": ""}, "add 'novelty' to LAYERS"),
    "torch in privacy": ({"fedllm/privacy/event.py": "import torch.nn"}, "privacy must do without"),
    "torch in secagg through another file": (
        {"fedllm/secagg/masks.py": "from fedllm.rng import Key", "fedllm/rng.py": "from torch import Generator"},
        "fedllm.secagg.masks needs torch",
    ),
    "torch in privacy through its package": (
        {"fedllm/privacy/event.py": "", "fedllm/privacy/__init__.py": "from torch import Tensor"},
        "fedllm.privacy.event needs torch",
    ),
    "stages in secagg": ({"fedllm/secagg/masks.py": "import fedllm.stages.prox"}, "needs fedllm.stages"),
    "datasets twice": (
        {"fedllm/tasks/a.py": "import datasets", "fedllm/federations/b.py": "from datasets.x import y"},
        "datasets is imported in 2 files",
    ),
    "peft outside of tasks": ({"fedllm/runs/launch.py": "import peft"}, "only tasks may"),
    "pickle": ({"fedllm/messages/serialization.py": "import pickle"}, "imports pickle"),
    "torch.load": ({"fedllm/runs/state.py": "import torch as t\nt.load(1)"}, "calls torch.load"),
    "torch.load by name": ({"fedllm/runs/state.py": "from torch import load as read\nread(1)"}, "calls torch.load"),
    "eval": ({"fedllm/experiment/config_file.py": "eval('1')"}, "calls eval"),
    "exec": ({"fedllm/experiment/config_file.py": "def f():\n    exec('1')"}, "calls exec"),
    "yaml.load": ({"fedllm/experiment/config_file.py": "import yaml\nyaml.load(1)"}, "calls yaml.load"),
    "yaml.load with its own loader": (
        {
            "fedllm/experiment/config_file.py": "import yaml\nclass L(yaml.SafeLoader, yaml.Loader): ...\nyaml.load(1, Loader=L)"
        },
        "calls yaml.load",
    ),
    "yaml.unsafe_load": (
        {"fedllm/experiment/config_file.py": "from yaml import unsafe_load\nunsafe_load(1)"},
        "yaml.unsafe_load",
    ),
    "remote code": ({"fedllm/tasks/m.py": "load(trust_remote_code=True)"}, "sets trust_remote_code"),
    "remote code by setting": ({"fedllm/tasks/m.py": "s = {'trust_remote_code': flag}"}, "sets trust_remote_code"),
    "arrays with objects": ({"fedllm/tasks/m.py": "np.load(p, allow_pickle=True)"}, "sets allow_pickle"),
}


@pytest.mark.parametrize(("sources", "sentence"), BAD.values(), ids=BAD.keys())
def test_bad_module_is_found(sources: dict[str, str], sentence: str) -> None:
    found = faults(modules_of(sources))
    assert len(found) >= 1
    assert any(sentence in line for line in found), found


def test_good_modules_pass() -> None:
    sources = {
        "fedllm/tensors/tree.py": "import torch",
        "fedllm/stages/base.py": "from fedllm.tree import Tree\nfrom fedllm import tree",
        "fedllm/stages/__init__.py": "from fedllm.stages.prox import Prox",
        "fedllm/stages/client_drift/prox.py": "from ..stage import Stage\nfrom fedllm.privacy.event import Gaussian",
        "fedllm/privacy/__init__.py": "",
        "fedllm/privacy/event.py": "import math\nfrom fedllm.privacy.accountant import Ledger",
        "fedllm/privacy/accountant.py": "from fedllm.errors import CheckError",
        "fedllm/errors.py": "",
        "fedllm/models/loaded_model.py": "import peft\nmodel.eval()\nload(trust_remote_code=False)\nyaml.safe_load(1)",
        "fedllm/cli/main.py": "from fedllm import run\nimport fedllm.console.page",
        "fedllm/__main__.py": "from fedllm.cli.main import main",
        "fedllm/__init__.py": "from fedllm.launch import run",
        "fedllm/runs/launch.py": "import fedllm\nfrom fedllm.loop import run\nfedllm.__version__",
        "fedllm/experiment/config_file.py": "import yaml as y\nclass L(y.SafeLoader): ...\ny.load(1, L)\ny.load(1, y.SafeLoader)",
    }
    assert faults(modules_of(sources)) == []
