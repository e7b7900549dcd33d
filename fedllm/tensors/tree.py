"""Algebra on trees: flat mappings from a leaf's name to its tensor.

A leaf's name is the path of the weight it belongs to, such as
`model.layers.0.self_attn.q_proj.lora_A`. Several trees travel as one by a prefix
(`add_prefix`, `select_prefix`). No function changes what it is given, but for `add_`, which works in place. A
`FlatTree` lies in blocks of memory, and so does what is made of it value by value.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from fedllm.tensors.flat_tree import FlatTree, elementwise, flatten, forms

__all__ = ["flatten", "forms"]

Tree = dict[str, Tensor]


def map_leaves(function: Callable[[Tensor], Tensor], tree: Mapping[str, Tensor]) -> Tree:
    """Apply `function` to each leaf."""
    return {name: function(leaf) for name, leaf in tree.items()}


def zeros_like(tree: Mapping[str, Tensor]) -> Tree:
    """Zeros in the shapes and dtypes of `tree`."""
    return elementwise(torch.zeros_like, tree)


def add(left: Mapping[str, Tensor], right: Mapping[str, Tensor], scale: float = 1.0) -> Tree:
    """left + scale * right. Leaves that `right` lacks stay as they are; it may hold no others."""
    assert right.keys() <= left.keys(), sorted(right.keys() - left.keys())
    if scale == 1.0 and isinstance(left, FlatTree) and left.alike(right):
        return elementwise(torch.add, left, right)
    alpha = 1 if scale == 1.0 else scale  # a whole number, for integers take no other
    # leaf by leaf: in bfloat16 the last values of a tensor are rounded otherwise than the rest, if there is a scale
    return {name: torch.add(leaf, right[name], alpha=alpha) if name in right else leaf for name, leaf in left.items()}


def sub(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> Tree:
    """left - right, over the leaves of `left`."""
    return elementwise(torch.sub, left, right)


def scale(tree: Mapping[str, Tensor], factor: float) -> Tree:
    """factor * tree. A factor of exactly 1 returns the leaves themselves."""
    if factor == 1.0:
        return tree if isinstance(tree, FlatTree) else dict(tree)
    return elementwise(lambda leaf: leaf * factor, tree)


def divide(tree: Mapping[str, Tensor], divisor: float) -> Tree:
    """tree / divisor."""
    return elementwise(lambda leaf: leaf / divisor, tree)


def add_(total: Tree, other: Mapping[str, Tensor]) -> None:
    """total += other, in place. Both hold the same leaves."""
    assert total.keys() == other.keys(), (sorted(total), sorted(other))
    if isinstance(total, FlatTree) and isinstance(other, FlatTree) and total.alike(other):
        for mine, theirs in zip(total.blocks, other.blocks, strict=True):
            mine.add_(theirs)
        return
    for name, leaf in total.items():
        leaf.add_(other[name])


def to(tree: Mapping[str, Tensor], device: str) -> Tree:
    """The leaves on a device; those that are there already are not copied."""
    if isinstance(tree, FlatTree) and all(block.device == torch.device(device) for block in tree.blocks):
        return tree
    return elementwise(lambda leaf: leaf.to(device), tree)


def norm(tree: Mapping[str, Tensor]) -> float:
    """The 2-norm over all (floating) leaves together, in float64; the order of the leaves does not change its bits, but
    whether they are flat trees may."""
    parts = (
        tree.blocks if isinstance(tree, FlatTree) else [tree[name] for name in sorted(tree)]
    )  # zeros are between them
    return math.hypot(*(float(torch.linalg.vector_norm(part, dtype=torch.float64)) for part in parts))


def finite(tree: Mapping[str, Tensor]) -> bool:
    """True if no leaf holds a NaN or an infinity; both show in a sum, which is several times faster than a look at each
    value. Values whose sum overflows their type count as infinite."""
    if isinstance(tree, FlatTree) and _all_finite([block.dot(block) for block in tree.blocks]):
        return True  # where a sum of squares is finite, so is the sum of each leaf; the inverse need not hold
    return _all_finite([leaf.sum() for leaf in tree.values()])


def _all_finite(sums: Sequence[Tensor]) -> bool:
    return not sums or bool(torch.isfinite(torch.stack([number.double() for number in sums])).all())


def equal(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Same names, dtypes, shapes and values."""
    return left.keys() == right.keys() and all(
        leaf.dtype == right[name].dtype and torch.equal(leaf, right[name]) for name, leaf in left.items()
    )


def num_bytes(tree: Mapping[str, Tensor]) -> int:
    """Bytes of the leaves' values, without names or headers."""
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in forms(tree).values())


def num_values(tree: Mapping[str, Tensor]) -> int:
    """How many numbers the leaves hold."""
    return sum(math.prod(shape) for _, shape in forms(tree).values())


def stack(trees: Iterable[Mapping[str, Tensor]]) -> Tree:
    """K trees of one shape to one tree whose leaves are (K, ...)."""
    listed = list(trees)
    if len(listed) == 1 and isinstance(listed[0], FlatTree):
        return listed[0].stacked()
    return {name: torch.stack([tree[name] for tree in listed]) for name in listed[0]}


def unstack(stacked: Mapping[str, Tensor], index: int) -> Tree:
    """Client `index`'s view of a stacked tree."""
    alone = stacked.unstacked() if isinstance(stacked, FlatTree) and index == 0 else None
    if alone is not None:
        return alone
    return {name: leaf[index] for name, leaf in stacked.items()}


def detached_copies(tree: Mapping[str, Tensor]) -> Tree:
    """The same values on the CPU, contiguous, no leaf in another's memory: what can be written to a file."""
    found = map_leaves(lambda leaf: leaf.detach().cpu().contiguous(), tree)
    end = 0
    for name in sorted(found, key=lambda name: found[name].data_ptr()):
        start, size = found[name].data_ptr(), found[name].nbytes
        if size and start < end:
            found[name] = found[name].clone()
        else:
            end = max(end, start + size)
    return found


def overlay(base: Mapping[str, Tensor], changes: Mapping[str, Tensor]) -> Tree:
    """The leaves of `base`, in its order; those that `changes` has are taken from there."""
    if isinstance(changes, FlatTree) and changes.keys() == base.keys():
        return changes.ordered(base)
    return {name: changes.get(name, leaf) for name, leaf in base.items()}


def add_prefix(**branches: Mapping[str, Tensor]) -> Tree:
    """Several trees as one: leaf `n` of branch `b` becomes `b/n`. No branch has a "/" in its name, so none collide."""
    assert not any("/" in branch for branch in branches), sorted(branches)
    return {f"{branch}/{name}": leaf for branch, tree in branches.items() for name, leaf in tree.items()}


def select_prefix(joined: Mapping[str, Tensor], name: str) -> Tree:
    """One branch of a joined tree; empty if there is none."""
    prefix = f"{name}/"
    return {key.removeprefix(prefix): leaf for key, leaf in joined.items() if key.startswith(prefix)}


def matches(name: str, patterns: Iterable[str]) -> bool:
    """True if a shell-style pattern fits the leaf's name (`*lora_B`, `*.layers.0.*`) and no `!pattern` does.

    Patterns that all begin with `!` stand for every name but those.
    """
    listed = list(patterns)
    refused = [pattern[1:] for pattern in listed if pattern.startswith("!")]
    wanted = [pattern for pattern in listed if not pattern.startswith("!")] or (["*"] if refused else [])
    return any(fnmatchcase(name, p) for p in wanted) and not any(fnmatchcase(name, p) for p in refused)


def digest(tree: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes; the order of the leaves does not matter."""
    state = hashlib.sha256()
    for name in sorted(tree):
        leaf = tree[name].detach().cpu().contiguous()
        # JSON ends where it ends and the shape says how many bytes follow: no two trees feed the same bytes.
        state.update(json.dumps([name, str(leaf.dtype), list(leaf.shape)]).encode())
        state.update(leaf.reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()
