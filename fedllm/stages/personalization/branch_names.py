"""The tensors of one branch of an adapter, and those of another that stand in the same place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fedllm.errors import ClientError


def twin(names: Iterable[str], branch: str, other: str) -> Iterator[tuple[str, str]]:
    """Each tensor of a branch with its twin in another one.

    Raises:
        ClientError: the two do not match.
    """
    known = set(names)
    for name in sorted(known):
        if in_branch(name, branch):
            mate = name.replace(f".{branch}.", f".{other}.")
            if mate not in known:
                raise ClientError(f"the adapter has {name} and no {mate}; its branches must have the same layers")
            yield name, mate


def in_branch(name: str, branch: str) -> bool:
    """Whether a tensor is one of a branch's."""
    return f".{branch}." in name
