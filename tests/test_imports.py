"""The import contract: which module of fedllm may import which, read from the source without running it.

The layers stand in `scripts/layout.py`, which also prints how the packages hang together. Here are the rules beside
them, and what shows that each of them finds a fault.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

import pytest


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "fedllm_scripts_layout", Path(__file__).resolve().parent.parent / "scripts" / "layout.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


layout = load()
Module, modules_of, imports_of = layout.Module, layout.modules_of, layout.imports_of
absolute, is_inside, top_of = layout.absolute, layout.is_inside, layout.top_of

# importer -> lower packages that are none of its business
FORBIDDEN = {
    "data": {"models"},
    "stages": {"models"},
    "aggregators": {"models"},
    "training": {"privacy"},
    "report": {"files", "tensors", "rng"},  # a page is made from the event log alone
    "cli": {"tensors", "messages", "models", "data", "training", "stages", "aggregators", "engines"},
}
WITHOUT = {"privacy": {"torch", "random", "numpy.random"}}  # not even through another file

# Optional or heavy packages: each is imported in one file, or nowhere outside of the folder named here.
SINGLE_FILE = {
    *("cryptography", "datasets", "dp_accounting", "flwr", "flwr_datasets"),
    *("nvflare", "plotly", "pyarrow", "ray"),
}
SINGLE_FOLDER = {"peft": "models", "cryptography": "privacy", "dp_accounting": "privacy"}
CODE_LOADERS = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
UNSAFE_CALLS = {
    *("eval", "exec", "builtins.eval", "builtins.exec", "torch.load", "torch.serialization.load", "torch.jit.load"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.unsafe_load_all"),
    *("yaml.full_load_all", "yaml.UnsafeLoader", "yaml.FullLoader", "yaml.Loader"),
}
UNSAFE_FLAGS = {"trust_remote_code", "allow_pickle"}


def forbidden_faults(modules: Mapping[str, Module]) -> Iterator[str]:
    """Pairs of packages that must not meet."""
    for module in modules.values():
        for target in sorted(set(imports_of(module, modules))):
            if is_inside(target, "fedllm") and top_of(target) in FORBIDDEN.get(module.top, ()):
                yield f"{module.name} imports {target}; {module.top} must not import {top_of(target)}."


def named_by_the_catalog(modules: Mapping[str, Module]) -> set[str]:
    """The files whose classes an experiment file names; contracts (`base`) and helpers are not among them."""
    catalog = modules.get("fedllm.experiment.catalog")
    if catalog is None:
        return set()
    tops = {"stages", "aggregators", "training"}
    found = {name for name in imports_of(catalog, modules) if top_of(name) in tops}
    return {name for name in found if not name.endswith(".base")}


def sibling_faults(modules: Mapping[str, Module]) -> Iterator[str]:
    """One idea, one file: what the catalog names does not import another such file."""
    named = named_by_the_catalog(modules)
    for name in sorted(named & modules.keys()):
        for target in sorted(set(imports_of(modules[name], modules)) & named - {name}):
            yield f"{name} imports {target}; no file that the catalog names imports another."


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
            names = closure(module.name, modules) | used_by(module)
            if any(is_inside(name, banned) for name in names):
                yield f"{module.name} needs {banned}; {module.top} must do without."


def used_by(module: Module) -> set[str]:
    """Dotted names that a module reads, such as `numpy.random.normal` of `np.random.normal`, or gives another name."""
    known_as = aliases_of(module)
    nodes = (node for node in ast.walk(module.source) if isinstance(node, ast.Attribute))
    return {dotted(node, known_as) for node in nodes} | set(known_as.values())


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
    rules = (
        *(layout.layer_faults, forbidden_faults, sibling_faults),
        *(purity_faults, dependency_faults, safety_faults),
    )
    return [sentence for rule in rules for sentence in rule(modules)]


def test_package_keeps_the_contract() -> None:
    modules = layout.read_package()
    assert len(modules) > 5, "no source was found"
    assert faults(modules) == []
    assert layout.circles(layout.arrows(modules)) == []
    assert len(named_by_the_catalog(modules)) > 20, "the rule about siblings has nothing to look at"


def test_every_folder_with_code_is_a_package() -> None:
    folders = {path.parent for path in layout.PACKAGE.rglob("*.py")}
    assert sorted(str(folder) for folder in folders if not (folder / "__init__.py").exists()) == []


def test_layers_name_each_package_once() -> None:
    names = [name for layer in layout.LAYERS for name in layer]
    assert len(names) == len(set(names))


def test_a_circle_is_found() -> None:
    sources = {
        "fedllm/data/a.py": "import fedllm.data.b",
        "fedllm/data/b.py": "def f():\n    from fedllm.data import a",
    }
    (circle,) = layout.circles(layout.arrows(modules_of({**sources, "fedllm/data/__init__.py": ""})))
    assert set(circle) == {"fedllm.data.a", "fedllm.data.b"}


CATALOG = {
    "fedllm/experiment/catalog.py": "from fedllm.stages.x.prox import Prox\nfrom fedllm.stages.x.dyn import Dyn",
    "fedllm/stages/x/dyn.py": "",
}
BAD = {
    "upwards": (
        {"fedllm/tensors/tree.py": "from fedllm import stages", "fedllm/stages/__init__.py": ""},
        "fedllm.stages, which is not below",
    ),
    "upwards inside a function": (
        {"fedllm/messages/update.py": "def f():\n    from fedllm.stages.prox import Prox"},
        "fedllm.stages.prox, which is not below",
    ),
    "upwards by dots": ({"fedllm/stages/prox.py": "from ..runs import run"}, "fedllm.runs, which is not below"),
    "upwards from a package": (
        {"fedllm/stages/__init__.py": "from ..engines import run"},
        "engines, which is not below",
    ),
    "beside": ({"fedllm/stages/a.py": "from fedllm.training.base import Work"}, "training.base, which is not below"),
    "the root by attribute": ({"fedllm/runs/round.py": "import fedllm\nfedllm.run(1)"}, "imports fedllm, which"),
    "the root": ({"fedllm/runs/round.py": "from fedllm import run", "fedllm/__init__.py": ""}, "imports fedllm, which"),
    "stage to stage": (
        {**CATALOG, "fedllm/stages/x/prox.py": "from fedllm.stages.x.dyn import Dyn"},
        "no file that the catalog names imports another",
    ),
    "stage to stage by dots": (
        {**CATALOG, "fedllm/stages/x/prox.py": "from . import dyn"},
        "no file that the catalog names imports another",
    ),
    "data to models": ({"fedllm/data/a.py": "from fedllm.models import x"}, "data must not import models"),
    "stages to models": ({"fedllm/stages/a.py": "import fedllm.models.batch"}, "stages must not import models"),
    "command line to tensors": (
        {"fedllm/cli/run.py": "from fedllm.tensors import tree"},
        "cli must not import tensors",
    ),
    "no layer": ({"fedllm/novelty.py": ""}, "add 'novelty' to LAYERS"),
    "torch in privacy": ({"fedllm/privacy/event.py": "import torch.nn"}, "privacy must do without"),
    "torch in privacy through another file": (
        {"fedllm/privacy/masks.py": "from fedllm.rng import Key", "fedllm/rng.py": "from torch import Generator"},
        "fedllm.privacy.masks needs torch",
    ),
    "torch in privacy through its package": (
        {"fedllm/privacy/event.py": "", "fedllm/privacy/__init__.py": "from torch import Tensor"},
        "fedllm.privacy.event needs torch",
    ),
    "seeded noise": ({"fedllm/privacy/noise.py": "import random"}, "needs random; privacy must do without"),
    "seeded noise by numpy": (
        {"fedllm/privacy/noise.py": "import numpy as np\nnp.random.default_rng(1)"},
        "needs numpy.random; privacy must do without",
    ),
    "seeded noise by another name": (
        {"fedllm/privacy/noise.py": "from numpy import random as r\nr.normal()"},
        "needs numpy.random; privacy must do without",
    ),
    "two accountants": (
        {
            "fedllm/privacy/a.py": "import dp_accounting.pld",
            "fedllm/privacy/b.py": "def f():\n    from dp_accounting import rdp",
        },
        "dp_accounting is imported in 2 files",
    ),
    "an accountant elsewhere": ({"fedllm/runs/ledger.py": "import dp_accounting"}, "only privacy may"),
    "datasets twice": (
        {"fedllm/models/a.py": "import datasets", "fedllm/data/b.py": "from datasets.x import y"},
        "datasets is imported in 2 files",
    ),
    "peft outside of models": ({"fedllm/runs/launch.py": "import peft"}, "only models may"),
    "pickle": ({"fedllm/messages/wire.py": "import pickle"}, "imports pickle"),
    "torch.load": ({"fedllm/runs/state.py": "import torch as t\nt.load(1)"}, "calls torch.load"),
    "torch.load by name": ({"fedllm/runs/state.py": "from torch import load as read\nread(1)"}, "calls torch.load"),
    "eval": ({"fedllm/experiment/f.py": "eval('1')"}, "calls eval"),
    "exec": ({"fedllm/experiment/f.py": "def f():\n    exec('1')"}, "calls exec"),
    "yaml.load": ({"fedllm/experiment/f.py": "import yaml\nyaml.load(1)"}, "calls yaml.load"),
    "yaml.load with its own loader": (
        {"fedllm/experiment/f.py": "import yaml\nclass L(yaml.SafeLoader, yaml.Loader): ...\nyaml.load(1, Loader=L)"},
        "calls yaml.load",
    ),
    "yaml.unsafe_load": (
        {"fedllm/experiment/f.py": "from yaml import unsafe_load\nunsafe_load(1)"},
        "yaml.unsafe_load",
    ),
    "remote code": ({"fedllm/models/m.py": "load(trust_remote_code=True)"}, "sets trust_remote_code"),
    "remote code by setting": ({"fedllm/models/m.py": "s = {'trust_remote_code': flag}"}, "sets trust_remote_code"),
    "arrays with objects": ({"fedllm/models/m.py": "np.load(p, allow_pickle=True)"}, "sets allow_pickle"),
}


@pytest.mark.parametrize(("sources", "sentence"), BAD.values(), ids=BAD.keys())
def test_bad_module_is_found(sources: dict[str, str], sentence: str) -> None:
    found = faults(modules_of(sources))
    assert len(found) >= 1
    assert any(sentence in line for line in found), found


def test_good_modules_pass() -> None:
    sources = {
        "fedllm/tensors/tree.py": "import torch",
        "fedllm/stages/base.py": "from fedllm.tensors.tree import Tree\nfrom fedllm.tensors import tree",
        "fedllm/stages/x/prox.py": "from ..base import Stage\nfrom fedllm.privacy.event import Gaussian",
        "fedllm/privacy/__init__.py": "",
        "fedllm/privacy/event.py": "import math\nimport numpy as np\nfrom fedllm.privacy.accountant import Ledger",
        "fedllm/privacy/accountant.py": "from fedllm.errors import CheckError",
        "fedllm/errors.py": "",
        "fedllm/models/loaded_model.py": "import peft\nmodel.eval()\nload(trust_remote_code=False)\nyaml.safe_load(1)",
        "fedllm/cli/main.py": "from fedllm.runs.launch import run",
        "fedllm/__main__.py": "from fedllm.cli.main import main",
        "fedllm/__init__.py": "from fedllm.runs.launch import run",
        "fedllm/runs/launch.py": "from fedllm.runs.server_round import run_round",
        "fedllm/experiment/f.py": "import yaml as y\nclass L(y.SafeLoader): ...\ny.load(1, L)\ny.load(1, y.SafeLoader)",
    }
    assert faults(modules_of(sources)) == []
