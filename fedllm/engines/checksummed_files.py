"""Files that hold their own checksum, so that one flipped bit is found when they are read.

A safetensors file has the SHA-256 of its tensors (`tree.digest`) in its metadata; a JSON file, that of its text among
its own keys. A file without one, as earlier versions wrote it, is taken as it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fedllm.errors import RunError
from fedllm.files import to_json_text
from fedllm.tensors import tree
from fedllm.tensors.tree import Tree

SUM = "sha256"


def written(trees: Tree) -> bytes:
    """A safetensors file of some tensors."""
    apart = tree.detached_copies(trees)
    return save(apart, metadata={SUM: tree.digest(apart)})


def read_tree(path: Path, advice: str) -> Tree:
    """The tensors of a safetensors file.

    Raises:
        RunError: it cannot be read, or is damaged; `advice` says what to do.
    """
    try:
        with safe_open(path, framework="pt") as file:
            known = (file.metadata() or {}).get(SUM)
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, LookupError) as error:
        raise _unreadable(path, error, advice) from error
    if known is not None and known != tree.digest(found):
        raise _damaged(path, advice)
    return found


def with_sum(facts: Mapping[str, Any]) -> str:
    """The text of a JSON file."""
    text = to_json_text(facts)
    return to_json_text({**facts, SUM: hashlib.sha256(text.encode()).hexdigest()})


def read_facts(path: Path, advice: str) -> dict[str, Any]:
    """What a JSON file holds.

    Raises:
        RunError: it cannot be read, or is damaged; `advice` says what to do.
    """
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        known = facts.pop(SUM, None)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise _unreadable(path, error, advice) from error
    if known is not None and known != hashlib.sha256(to_json_text(facts).encode()).hexdigest():
        raise _damaged(path, advice)
    return facts


def _unreadable(path: Path, error: Exception, advice: str) -> RunError:
    return RunError(f"{path} cannot be read ({' '.join(str(error).split())}); {advice}")


def _damaged(path: Path, advice: str) -> RunError:
    return RunError(f"{path} is damaged: it is not what was written there (its checksum is another one); {advice}")


RESUME = "resume the run"
