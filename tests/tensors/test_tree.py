"""Algebra on trees, against numpy and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedllm.tensors import tree
from fedllm.tensors.tree import Tree

NAMES = ("layers.0.lora_A", "layers.0.lora_B", "head/bias")
SHAPES = ((2, 3), (), (0, 4))
FLOATS = st.floats(-100, 100, width=32)


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    """Three leaves: a matrix, a number and an empty one."""
    return {
        name: torch.tensor(draw(st.lists(FLOATS, min_size=size, max_size=size)), dtype=torch.float64).reshape(shape)
        for name, shape in zip(NAMES, SHAPES, strict=True)
        for size in [int(np.prod(shape))]
    }


def flat(leaves: Tree) -> np.ndarray:
    return np.concatenate([leaves[name].numpy().reshape(-1) for name in NAMES])


@given(trees(), trees(), st.floats(-4, 4))
def test_algebra_is_that_of_vectors(left: Tree, right: Tree, factor: float) -> None:
    before = tree.digest(left), tree.digest(right)
    a, b = flat(left), flat(right)
    np.testing.assert_array_equal(flat(tree.add(left, right)), a + b)
    np.testing.assert_allclose(flat(tree.add(left, right, factor)), a + factor * b, atol=1e-12)
    np.testing.assert_array_equal(flat(tree.sub(left, right)), a - b)
    np.testing.assert_array_equal(flat(tree.scale(left, factor)), a * factor)
    np.testing.assert_allclose(tree.norm(left), np.sqrt((a**2).sum()), rtol=1e-14)
    assert not flat(tree.zeros_like(left)).any() and tree.num_values(left) == a.size
    assert (tree.digest(left), tree.digest(right)) == before


@given(trees(), trees())
def test_add_in_place_equals_add(left: Tree, right: Tree) -> None:
    total = tree.map_leaves(torch.clone, left)
    tree.add_(total, right)
    assert tree.equal(total, tree.add(left, right))


def test_add_keeps_what_is_not_added_to_and_takes_integers() -> None:
    left = {"a": torch.tensor([1, 2]), "b": torch.tensor([2**53 + 1])}
    total = tree.add(left, {"b": torch.tensor([1])})
    assert total["a"] is left["a"]
    assert total["b"].dtype == torch.int64 and total["b"].tolist() == [2**53 + 2]  # no float64 holds 2^53 + 1
    with pytest.raises(AssertionError):
        tree.add({}, {"a": torch.tensor([1])})


def test_add_in_place_refuses_other_leaves() -> None:
    with pytest.raises(AssertionError):
        tree.add_({"a": torch.zeros(1)}, {"b": torch.zeros(1)})


def test_scale_by_one_gives_the_leaves_themselves() -> None:
    leaves = {"a": torch.ones(2, dtype=torch.int64)}
    assert tree.scale(leaves, 1.0)["a"] is leaves["a"]
    assert tree.scale(leaves, 1.0) is not leaves


def test_norm_by_hand() -> None:
    assert tree.norm({}) == 0
    assert tree.norm({"a": torch.tensor([3.0]), "b": torch.tensor([[4.0], [12.0]])}) == 13.0
    assert tree.norm({"a": torch.tensor([3e200, 4e200], dtype=torch.float64)}) == math.inf  # as its square is
    assert tree.norm({"a": torch.full((1 << 20,), 0.1, dtype=torch.bfloat16)}) == pytest.approx(0.10009765625 * 2**10)


@given(st.permutations(range(6)))
def test_norm_and_digest_do_not_depend_on_the_order_of_leaves(order: list[int]) -> None:
    leaves = {f"leaf{place}": torch.tensor([0.1 * 1.7**place], dtype=torch.float64) for place in range(6)}
    other = {f"leaf{place}": leaves[f"leaf{place}"] for place in order}
    assert tree.norm(other) == tree.norm(leaves)
    assert tree.digest(other) == tree.digest(leaves)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_finite(bad: float) -> None:
    assert tree.finite({}) and tree.finite({"a": torch.zeros(3), "n": torch.tensor(3)})
    assert not tree.finite({"a": torch.zeros(3), "b": torch.tensor([[0.0, bad]])})


def test_sizes() -> None:
    leaves = {"a": torch.zeros(3, 5), "b": torch.zeros(2, dtype=torch.bfloat16), "c": torch.zeros(0, dtype=torch.int64)}
    assert (tree.num_bytes(leaves), tree.num_values(leaves)) == (15 * 4 + 2 * 2, 17)


@given(st.lists(trees(), min_size=1, max_size=4))
def test_unstack_inverts_stack(listed: list[Tree]) -> None:
    stacked = tree.stack(listed)
    assert all(leaf.shape[0] == len(listed) for leaf in stacked.values())
    for index, leaves in enumerate(listed):
        assert tree.equal(tree.unstack(stacked, index), leaves)


def test_unstacked_leaves_are_views() -> None:
    stacked = tree.stack([{"a": torch.zeros(2)}, {"a": torch.zeros(2)}])
    tree.unstack(stacked, 1)["a"].fill_(5)
    assert stacked["a"].tolist() == [[0, 0], [5, 5]]


@given(st.dictionaries(st.sampled_from(["a", "b", "state1", "state10"]), trees(), max_size=4))
def test_branch_inverts_join(branches: dict[str, Tree]) -> None:
    joined = tree.add_prefix(**branches)
    assert len(joined) == sum(map(len, branches.values()))
    for name in ("a", "b", "state1", "state10"):
        assert tree.select_prefix(joined, name) == branches.get(name, {})


def test_leaf_names_that_look_like_branches_do_not_collide() -> None:
    one, two = torch.tensor(1), torch.tensor(2)
    joined = tree.add_prefix(a={"b/x": one, "": two}, b={"x": two, "a/b/x": one})
    assert tree.select_prefix(joined, "a") == {"b/x": one, "": two}
    assert tree.select_prefix(joined, "b") == {"x": two, "a/b/x": one}
    with pytest.raises(AssertionError):
        tree.add_prefix(**{"a/b": {"x": one}})


def test_separate_leaves_own_their_memory() -> None:
    whole = torch.arange(12.0).reshape(3, 4).requires_grad_()
    leaves = {"t": whole.T, "same": whole, "row": whole[1], "column": whole[:, 2], "wide": torch.ones(1).expand(3)}
    apart = tree.detached_copies(leaves)
    assert tree.equal(apart, {name: leaf.detach() for name, leaf in leaves.items()})
    assert all(leaf.is_contiguous() and not leaf.requires_grad for leaf in apart.values())
    assert len({leaf.untyped_storage().data_ptr() for leaf in apart.values()}) == len(apart)


@pytest.mark.parametrize(
    ("name", "patterns", "expected"),
    [
        ("model.layers.0.q_proj.lora_B", ["*lora_B"], True),
        ("model.layers.0.q_proj.lora_B", ["*lora_A", "*.layers.0.*"], True),
        ("model.layers.10.q_proj.lora_B", ["*.layers.1.*"], False),
        ("model.layers.0.q_proj.lora_B", ["*lora_b"], False),  # case counts
        ("a", [], False),
        ("a", ["*"], True),
        ("a", ["!a"], False),
        ("b", ["!a"], True),  # nothing but refusals: all others
        ("b", ["!a", "!b*"], False),
        ("ab", ["a*", "!*b"], False),
        ("ac", ["a*", "!*b"], True),
        ("c", ["a*", "!*b"], False),
        ("a", ["!*"], False),
    ],
)
def test_matches(name: str, patterns: list[str], expected: bool) -> None:
    assert tree.matches(name, patterns) is expected
    assert tree.matches(name, iter(patterns)) is expected


def test_equal_compares_names_types_shapes_and_values() -> None:
    leaves = {"a": torch.zeros(2, 3)}
    assert tree.equal(leaves, {"a": torch.zeros(2, 3)})
    others: list[Tree] = [
        {},
        {"b": torch.zeros(2, 3)},
        {"a": torch.zeros(3, 2)},
        {"a": torch.zeros(2, 3, dtype=torch.float64)},
        {"a": torch.tensor([[0, 0, 0], [0, 0, 1e-30]])},
        {"a": torch.zeros(2, 3), "b": torch.zeros(1)},
    ]
    assert not any(tree.equal(leaves, other) or tree.equal(other, leaves) for other in others)


def test_digest_sees_every_difference() -> None:
    trees_: list[Tree] = [
        {},
        {"a": torch.zeros(2, 3)},
        {"b": torch.zeros(2, 3)},
        {"a": torch.zeros(3, 2)},
        {"a": torch.zeros(6)},
        {"a": torch.zeros(2, 3, dtype=torch.int32)},
        {"a": torch.zeros(2, 3, dtype=torch.float64)},
        {"a": -torch.zeros(2, 3)},  # the sign of a zero is a bit
        {"a": torch.zeros(2, 3).index_fill(0, torch.tensor([1]), 1e-40)},
        {"a": torch.zeros(2, 3), "b": torch.zeros(0)},
        {"a": torch.zeros(0), "b": torch.zeros(2, 3)},
        {"a": torch.tensor(True)},
        {"a": torch.tensor(1, dtype=torch.uint8)},
    ]
    assert len({tree.digest(leaves) for leaves in trees_}) == len(trees_)


def test_digest_is_that_of_the_values() -> None:
    whole = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    assert tree.digest({"a": whole.T}) == tree.digest({"a": whole.T.contiguous()}) != tree.digest({"a": whole})
    assert tree.digest({"a": torch.tensor([float("nan")])}) == tree.digest({"a": torch.tensor([float("nan")])})
    # printf '["a", "torch.uint8", [2]]\1\2' | sha256sum
    expected = "56f438cffe56967b192d1d28c1bb372a298d2360daabfaf3296cc01a21eb51e2"
    assert tree.digest({"a": torch.tensor([1, 2], dtype=torch.uint8)}) == expected
