"""The core schema of YAML 1.2, read with PyYAML's safe loader.

1e-3 is a number        no, yes, on, off, 010 and 2024-05-01 are text        a key given twice is refused
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable
from typing import Any

import yaml

from fedllm.errors import ConfigError

MOST_REPEATED = 10_000  # values that aliases stand for
HUGE = 10**12  # values: as good as endless
FORMS = {  # tag -> what is written so, and the characters that it begins with
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(0|[1-9][\d_]*)", list("-+0123456789")),
    "float": (
        r"[-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*|\d[\d_]*(?=[eE]))([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}
HINTS = {  # what PyYAML says -> what to do
    r"'\t'": "; indent with spaces, not tabs",
    "undefined alias": "; put text that begins with * in quotes",
    "constructor for the tag": "; put text that begins with ! in quotes",
}


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML's own protocol; filled below

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: list[Any] = []
        for place, _ in node.value:
            key = self.construct_object(place, deep=True)
            if key in seen:
                raise ConfigError(f"line {place.start_mark.line + 1}: the key '{key}' is given twice")
            seen.append(key)
        return super().construct_mapping(node, deep)


for _tag, (_pattern, _begins) in FORMS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _begins)


def read_yaml(text: str) -> Any:
    """Plain values from YAML.

    Raises:
        ConfigError: it is not YAML, or a key is given twice; with the line.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _require_short(node)
        return loader.construct_document(node)
    except ConfigError:
        raise
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        problem = error.problem or error.context or ""
        hint = next((hint for sign, hint in HINTS.items() if sign in problem), "")
        raise ConfigError(f"{line}it is not YAML: {problem}{hint}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"it is not YAML: {' '.join(str(error).split())}") from error
    finally:
        loader.dispose()


def _require_short(root: yaml.Node) -> None:
    """Refuse aliases that stand for very much: a few hundred letters can name what no memory holds.

    Each node is counted once and its size is kept, so that this takes as long as the text, not as what it stands for.
    """
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node) -> int:
        if id(node) in open_nodes:
            raise ConfigError(
                f"line {node.start_mark.line + 1}: an alias stands for what it is a part of; write it out"
            )
        if id(node) not in sizes:
            open_nodes.add(id(node))
            inner = node.value if isinstance(node, yaml.CollectionNode) else ()
            parts = [part for item in inner for part in (item if isinstance(item, tuple) else (item,))]
            sizes[id(node)] = min(1 + sum(map(size, parts)), HUGE)
            open_nodes.discard(id(node))
        return sizes[id(node)]

    repeated = size(root) - len(sizes)
    if repeated > MOST_REPEATED:
        raise ConfigError(
            f"its aliases (*name) stand for more than {MOST_REPEATED:,} values that are written elsewhere; write out "
            "what is needed"
        )


class _Dumper(yaml.SafeDumper):
    """Quotes text that `read_yaml` would read as something else."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    plain = any(re.fullmatch(pattern, text) for pattern, _ in FORMS.values())
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'" if plain else None)


_Dumper.add_representer(str, _text)


def write_line(value: Any) -> str:
    """YAML in one line, as an override's value may be written: `[{prox: {mu: 0.1}}, uniform]`."""
    text: str = yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=True, width=math.inf
    )
    return text.removesuffix("\n").removesuffix("\n...")


def write_yaml(value: Any) -> str:
    """YAML that `read_yaml` reads back as the same values."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
