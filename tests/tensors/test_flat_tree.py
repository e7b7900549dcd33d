"""Flat trees: the same bits as leaf by leaf, whoever shares memory with whom, and how many calls a round makes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fedllm.aggregators.sum import Sum
from fedllm.engines.client import Site
from fedllm.engines.client_store import ClientStore
from fedllm.experiment.record import Experiment
from fedllm.messages.call import Replies
from fedllm.messages.serialization import deserialize, serialize
from fedllm.messages.update import Part, Request, Update
from fedllm.models.loaded_model import load
from fedllm.rng import Key
from fedllm.runs import server_round
from fedllm.runs.checkpoints import Checkpoints
from fedllm.runs.state import ServerState
from fedllm.tensors import layout, tree
from fedllm.tensors.flat_tree import ALIGNMENT, FlatTree, flatten
from fedllm.tensors.tree import Tree
from tests.runs.small import small as experiment_of
from tests.runs.small import write_records

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64)
SHAPES = st.sampled_from([(), (1,), (3,), (2, 3), (0, 4), (1, 5), (16,), (7, 5), (1, 1, 2)])


def filled(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    numbers = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 10
    return numbers.to(dtype)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Tree, Tree]:
    """Two trees of the same leaves, of one dtype or of several, of which there are enough to be put together."""
    kinds = st.sampled_from([draw(st.sampled_from(DTYPES))] if draw(st.booleans()) else DTYPES)
    forms = draw(st.lists(st.tuples(SHAPES, kinds), min_size=4, max_size=9))
    forms.sort(key=lambda form: str(form[1]))
    left, right = (
        {f"leaf{place}": filled(*form, seed=100 * draw(st.integers(0, 99)) + place) for place, form in enumerate(forms)}
        for _ in range(2)
    )
    assume(isinstance(flatten(left), FlatTree))
    return left, right


FUNCTIONS: Mapping[str, Callable[[Tree, Tree, float], Tree]] = {
    "zeros_like": lambda a, b, x: tree.zeros_like(a),
    "add": lambda a, b, x: tree.add(a, b),
    "sub": lambda a, b, x: tree.sub(a, b),
    "scale": lambda a, b, x: tree.scale(a, x),
    "scale by one": lambda a, b, x: tree.scale(a, 1.0),
    "divide": lambda a, b, x: tree.divide(a, x),
    "to": lambda a, b, x: tree.to(a, "cpu"),
    "separate": lambda a, b, x: tree.detached_copies(a),
    "stack of one": lambda a, b, x: tree.stack([a]),
    "stack of two": lambda a, b, x: tree.stack([a, b]),
    "unstack one": lambda a, b, x: tree.unstack(tree.stack([a]), 0),
    "unstack the last": lambda a, b, x: tree.unstack(tree.stack([a]), -1),
    "unstack two": lambda a, b, x: tree.unstack(tree.stack([a, b]), 1),
    "map": lambda a, b, x: tree.map_leaves(torch.neg, a),
    "join": lambda a, b, x: tree.add_prefix(a=a, b=b),
    "branch": lambda a, b, x: tree.select_prefix(tree.add_prefix(a=a, b=b), "b"),
    "over": lambda a, b, x: tree.overlay(a, b),
    "over another order": lambda a, b, x: tree.overlay(dict(reversed(a.items())), b),
    "chain": lambda a, b, x: tree.add(a, tree.divide(tree.scale(tree.sub(b, a), x), x)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@settings(max_examples=20)  # a function
@given(pairs(), st.sampled_from([0.3, 25.0, -1e-3, 7.0]))
def test_every_function_gives_the_bits_of_leaf_by_leaf(name: str, trees: tuple[Tree, Tree], factor: float) -> None:
    left, right = trees
    function = FUNCTIONS[name]
    before = tree.digest(left), tree.digest(right)
    for one in (left, flatten(left)):
        for other in (right, flatten(right), flatten(dict(reversed(right.items())))):
            found, expected = function(one, other, factor), function(left, dict(other), factor)
            assert list(found) == list(expected)
            assert {n: leaf.dtype for n, leaf in found.items()} == {n: leaf.dtype for n, leaf in expected.items()}
            assert {n: leaf.shape for n, leaf in found.items()} == {n: leaf.shape for n, leaf in expected.items()}
            assert tree.digest(found) == tree.digest(expected)
            assert (tree.digest(one), tree.digest(other)) == before
            if isinstance(found, FlatTree):  # zeros lie between its leaves
                sums = (sum(int(part.count_nonzero()) for part in parts) for parts in (found.blocks, found.values()))
                assert len(set(sums)) == 1


@given(pairs(), st.sampled_from([0.3, -2.5]))
def test_scaled_sums_numbers_and_sums_in_place(trees: tuple[Tree, Tree], factor: float) -> None:
    left, right = trees
    for one in (left, flatten(left)):
        for other in (right, flatten(right)):
            for function in (tree.finite, tree.num_bytes, tree.num_values, tree.digest):
                floats = {name: leaf for name, leaf in one.items() if leaf.is_floating_point()}
                expected = function({name: left[name] for name in floats})
                assert function(floats) == expected
            assert tree.num_bytes(one) == tree.num_bytes(left) and tree.num_values(one) == tree.num_values(left)
            assert tree.finite(one)
            assert tree.equal(one, left) and tree.equal(left, one)
            if all(leaf.is_floating_point() for leaf in left.values()):
                assert tree.norm(one) == pytest.approx(tree.norm(left), rel=1e-14, abs=0)
                assert tree.digest(tree.add(one, other, factor)) == tree.digest(tree.add(left, right, factor))
            total = flatten(tree.map_leaves(torch.clone, one)) if isinstance(one, FlatTree) else copied(one)
            tree.add_(total, other)
            assert tree.digest(total) == tree.digest(tree.add(left, right))


def copied(leaves: Tree) -> Tree:
    return {name: leaf.clone() for name, leaf in leaves.items()}


def small(*values: float, dtype: torch.dtype = torch.float32) -> Tree:
    """A flat tree of one value a leaf."""
    made = flatten({f"n{place}": torch.tensor([value], dtype=dtype) for place, value in enumerate(values)})
    assert isinstance(made, FlatTree)
    return made


def test_leaves_lie_in_blocks_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "BLOCK_BYTES", 256)
    leaves = {
        "a": torch.ones(3),  # 12 bytes, filled up to 64
        "b": torch.ones(4, 8),  # 128 bytes: 192 in all
        "c": torch.ones(17),  # 68 bytes more would be 260
        "d": torch.ones(()),
        "e": torch.ones(2, dtype=torch.float64),  # another dtype, another block
        "f": torch.ones(0, dtype=torch.float64),
    }
    made = flatten(leaves)
    assert isinstance(made, FlatTree)
    assert [(block.dtype, len(block)) for block in made.blocks] == [
        (torch.float32, 48),
        (torch.float32, 48),
        (torch.float64, 8),
    ]
    starts = {name: (made.layout[name][0], made[name].storage_offset()) for name in made}
    assert starts == {"a": (0, 0), "b": (0, 16), "c": (1, 0), "d": (1, 32), "e": (2, 0), "f": (2, 8)}
    assert all(leaf.data_ptr() % ALIGNMENT == 0 and leaf.is_contiguous() for leaf in made.values() if leaf.numel())
    assert made.blocks[0].tolist() == [1.0] * 3 + [0.0] * 13 + [1.0] * 32


def test_trees_that_gain_nothing_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "BLOCK_BYTES", 256)
    for leaves in ({}, {"a": torch.ones(2)}, {"a": torch.ones(99), "b": torch.ones(99), "c": torch.ones(2)}):
        made = flatten(leaves)
        assert not isinstance(made, FlatTree) and made is not leaves
        assert list(made) == list(leaves) and all(made[name] is leaf for name, leaf in leaves.items())
    once = small(1, 2)
    assert flatten(once) is once


def test_a_flat_tree_is_a_copy_and_its_leaves_are_its_blocks() -> None:
    leaves = {"a": torch.ones(2).requires_grad_(), "b": torch.ones(2, 2).T}
    made = flatten(leaves)
    assert isinstance(made, FlatTree) and not made["a"].requires_grad
    made["a"].fill_(7)
    assert leaves["a"].tolist() == [1, 1] and made.blocks[0][:2].tolist() == [7, 7]
    made.blocks[0].zero_()
    assert not made["b"].any()


def test_a_flat_tree_takes_no_other_leaves() -> None:
    made, one = small(1, 2), torch.ones(1)
    acts: list[Callable[[], Any]] = [
        lambda: made.__setitem__("n0", one),
        lambda: made.__delitem__("n0"),
        lambda: made.__ior__({"n0": one}),
        lambda: made.update(n0=one),
        lambda: made.setdefault("n9", one),
        lambda: made.pop("n0"),
        made.popitem,
        made.clear,
    ]
    for act in acts:
        with pytest.raises(TypeError, match=r"change dict\(tree\) instead"):
            act()
    for plain in (dict(made), {**made}, made | {"n9": one}, copy.copy(dict(made)), made.copy()):
        assert type(plain) is dict
        plain["n0"] = one
    assert made["n0"] is not one and len(made) == 2


def test_only_the_same_leaves_of_the_same_kind_are_alike() -> None:
    one = small(1, 2)
    assert isinstance(one, FlatTree)
    assert one.alike(small(3, 4)) and one.alike(one.ordered(["n1", "n0"]))
    others = [
        small(1, 2, 3),
        small(1, 2, dtype=torch.float64),
        dict(one),
        {},
        flatten({"n0": one["n0"], "m": one["n1"]}),
    ]
    assert not any(one.alike(other) for other in others)
    assert not one.alike(one.stacked())


def test_results_are_flat_trees_and_share_no_memory_but_where_they_must() -> None:
    one, other = small(1, 2), small(3, 4)
    before = tree.digest(one), tree.digest(other)
    made = [
        tree.zeros_like(one),
        tree.add(one, other),
        tree.sub(one, other),
        tree.scale(one, 2.0),
        tree.divide(one, 1.0),
        tree.stack([one]),
    ]
    for found in made:
        assert isinstance(found, FlatTree)
        for leaf in found.values():
            leaf.fill_(99)
    assert (tree.digest(one), tree.digest(other)) == before
    for same in (tree.scale(one, 1.0), tree.to(one, "cpu"), tree.overlay(one, one), tree.unstack(tree.stack([one]), 0)):
        assert isinstance(same, FlatTree)
    stacked = tree.stack([one])
    tree.unstack(stacked, 0)["n1"].fill_(5)
    assert stacked["n1"].tolist() == [[5]] and one["n1"].tolist() == [2]
    with pytest.raises(IndexError):
        tree.unstack(stacked, 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_finite_sees_every_leaf_of_a_flat_tree(bad: float) -> None:
    assert not tree.finite(small(1, bad, 2)) and not tree.finite(small(bad, -bad, 2))


def test_leaves_whose_sum_overflows_are_not_finite_in_a_flat_tree_either() -> None:
    high, low = torch.full((4,), 6e4, dtype=torch.float16), torch.full((4,), -6e4, dtype=torch.float16)
    assert not torch.isfinite(high.sum()) and torch.isfinite(torch.cat([high, low]).sum())  # together they cancel
    for make in (dict, flatten):
        assert not tree.finite(make({"a": high, "b": low}))
        assert tree.finite(make({"a": high[:1], "b": high[1:2]}))  # though their squares overflow


def test_separate_copies_what_overlaps_and_nothing_else() -> None:
    one = small(1, 2, 3)
    apart = tree.detached_copies(one)
    assert all(apart[name].data_ptr() == leaf.data_ptr() for name, leaf in one.items())
    both = tree.detached_copies(tree.add_prefix(a=one, b=one))  # twice the same memory
    assert len({leaf.data_ptr() for leaf in both.values()}) == len(both) == 6
    whole = torch.arange(10.0)
    parts = tree.detached_copies({"whole": whole, "middle": whole[2:4], "end": whole[8:], "empty": whole[3:3]})
    assert parts["whole"].data_ptr() == whole.data_ptr()
    parts["whole"].fill_(-1)
    assert parts["middle"].tolist() == [2, 3] and parts["end"].tolist() == [8, 9]


def test_messages_and_checkpoints_of_flat_trees_are_those_of_plain_trees(tmp_path: Path) -> None:
    one = small(1, 2, 3)
    update = Update({"delta": Part(one, 2.0), "more": Part(one, 0.0)})
    plainly = Update({name: replace(part, tree=copied(part.tree)) for name, part in update.parts.items()})
    assert serialize(update) == serialize(plainly)
    back = deserialize(serialize(update))
    assert isinstance(back, Update) and tree.equal(back.parts["more"].tree, one)
    for name, params in (("a", one), ("b", copied(one))):
        Checkpoints(tmp_path / name, 1).save(
            ServerState(params=params, states=({"m": one["n0"]},), round=1, key=Key(0))
        )
    files = [tmp_path / name / "round-000001" / "server.safetensors" for name in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()
    loaded = Checkpoints(tmp_path / "a", 1).load()
    assert loaded is not None and isinstance(loaded.params, FlatTree) and tree.equal(loaded.params, one)


def test_the_sum_of_flat_trees_and_plain_trees() -> None:
    def call(name: str, asked: Mapping[str, Request]) -> Replies:
        for place, kind in enumerate((flatten, flatten, dict, flatten)):
            yield str(place), Update({"delta": Part(kind(dict(small(place, 10 * place))), 1.0)})

    total = Sum().reduce(call, {}).parts["delta"].tree
    assert isinstance(total, FlatTree) and [leaf.item() for leaf in total.values()] == [6, 60]
    assert total.blocks[0].sum() == 66


@pytest.mark.parametrize("letters", [3, layout.REMEMBERED])
def test_places_of_trees_with_very_long_names_are_not_kept(letters: int) -> None:
    layout._placed.cache_clear()
    tree = {f"{place}{'x' * letters}": torch.full((2,), float(place)) for place in range(6)}
    before = layout._placed.cache_info().currsize
    made = flatten(tree)
    assert isinstance(made, FlatTree) and [float(leaf[0]) for leaf in made.values()] == [0, 1, 2, 3, 4, 5]
    assert (layout._placed.cache_info().currsize > before) == (letters < 100)


@dataclass
class Counted(TorchDispatchMode):
    """Counts the tensor operations that are no views: each costs a call and memory."""

    calls: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += not func.is_view
        return func(*args, **(kwargs or {}))


def two_rounds(setting: Experiment, clients: int) -> tuple[Tree, int]:
    """The parameters after two rounds of some clients, and the operations of the second one."""
    model, population = load(setting.task), setting.federation.load(setting.key)
    site, asked = Site(setting, model, population, ClientStore(None)), population.clients[:clients]
    state = server_round.initial_state(setting, model.initial_params(setting.key))

    def call(name: str, requests: Mapping[str, Request]) -> Iterator[tuple[str, Any]]:
        for client, request in requests.items():
            yield client, site.answer(name, request)

    state, _ = server_round.run_round(state, setting, asked, call, lambda event: None)
    with Counted() as counted:
        state, _ = server_round.run_round(state, setting, asked, call, lambda event: None)
    return state.params, counted.calls


@pytest.mark.parametrize("weigher", ["by_examples", "uniform"])
def test_an_empty_round_makes_less_than_one_call_a_leaf(
    weigher: str, tmp_path: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_records(tmp_path / "people.jsonl")
    setting = experiment_of(
        data, stages=[weigher], work__sgd__steps=0, task__adapter__lora__targets=["all_linear"], rounds=2
    )
    params, calls = two_rounds(setting, 1)
    assert isinstance(params, FlatTree) and len(params) >= 28
    assert calls < len(params)  # leaf by leaf there are six for each
    monkeypatch.setattr(layout, "BLOCK_BYTES", 0)
    assert two_rounds(setting, 1)[1] > 5 * len(params)  # so they are counted


def test_rounds_in_flat_trees_have_the_bits_of_rounds_leaf_by_leaf(
    tmp_path: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting, results = experiment_of(write_records(tmp_path / "people.jsonl")), []
    for size in (layout.BLOCK_BYTES, 4096, 0):
        monkeypatch.setattr(layout, "BLOCK_BYTES", size)
        results.append(two_rounds(setting, 3)[0])
    assert [type(params) for params in results] == [FlatTree, FlatTree, dict]
    assert len({tree.digest(params) for params in results}) == 1


def test_a_deep_copy_has_blocks_of_its_own() -> None:
    one = small(1, 2)
    other = copy.deepcopy(one)
    assert isinstance(other, FlatTree) and tree.equal(one, other)
    other.blocks[0].zero_()
    assert not other["n1"].any() and one["n1"].item() == 2


def test_views_are_made_when_they_are_asked_for_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, ...]] = []
    plain = torch.Tensor.as_strided
    monkeypatch.setattr(
        torch.Tensor, "as_strided", lambda block, shape, *rest: made.append(shape) or plain(block, shape, *rest)
    )
    whole = small(1.0, 2.0, 3.0)
    made.clear()
    doubled = tree.add(whole, whole)
    assert list(doubled) == list(whole) and "n1" in doubled and len(doubled) == 3
    assert tree.num_bytes(doubled) == 12 and tree.finite(doubled) and tree.forms(doubled) == tree.forms(whole)
    assert not made
    assert doubled["n1"] is doubled["n1"] and doubled.get("n1") is doubled["n1"] and doubled.get("other") is None
    assert len(made) == 1
    with pytest.raises(KeyError):
        doubled["other"]


def test_flat_trees_are_compared_and_shown_by_their_leaves() -> None:
    one, two, other = small(1.0, 2.0), small(1.0, 2.0), small(1.0, 3.0)
    assert one == two and one == dict(two) and dict(one) == two
    assert one != other and one != dict(other) and dict(one) != other and one != {}
    assert repr(one) == repr(dict(one)) and "tensor([2.])" in repr(one)


COPIES: Mapping[str, Callable[[Any], Mapping[str, torch.Tensor]]] = {
    "dict": dict,
    "unpacked": lambda flat: {**flat},
    "keywords": lambda flat: dict(**flat),
    "or": lambda flat: flat | {},
    "or from the right": lambda flat: {} | flat,
    "or in place": lambda flat: {}.__ior__(flat),
    "update": lambda flat: [found := {}, found.update(flat)][0],
    "copy": lambda flat: flat.copy(),
    "items": lambda flat: dict(flat.items()),
    "values": lambda flat: dict(zip(flat, flat.values(), strict=True)),
    "a shallow copy": copy.copy,
    "a deep copy": copy.deepcopy,
}


@pytest.mark.parametrize("name", COPIES)
def test_whoever_takes_all_leaves_finds_them_made(name: str) -> None:
    found = COPIES[name](small(1.0, 2.0, 3.0))
    assert {leaf: value.tolist() for leaf, value in found.items()} == {"n0": [1.0], "n1": [2.0], "n2": [3.0]}
