"""Files of trees against the safetensors library: the same bytes, the same tensors, and whatever it refuses."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from fedllm.tensors import layout, safetensors_io, tree
from fedllm.tensors.flat_tree import ALIGNMENT, FlatTree, flatten
from fedllm.tensors.tree import Tree
from tests.messages.test_serialization import trees

PREFIXES = ("params", "extra0", "part1")


@settings(max_examples=200)
@given(st.dictionaries(st.sampled_from(PREFIXES), trees(), max_size=3), st.text(max_size=9), st.booleans())
def test_the_file_is_what_safetensors_writes_and_comes_back(held: dict[str, Tree], text: str, blocks: bool) -> None:
    given_trees = {prefix: flatten(leaves) for prefix, leaves in held.items()} if blocks else held
    data, joined = safetensors_io.to_bytes(given_trees, text), tree.add_prefix(**held)
    assert data == save(tree.detached_copies(joined), {"fedllm": text})
    found, back = safetensors_io.from_bytes(data)
    assert found == text and tree.digest(tree.add_prefix(**back)) == tree.digest(joined) == tree.digest(load(data))


def many(dtype: torch.dtype = torch.float32, leaves: int = 9, width: int = 5) -> Tree:
    return {f"layer.{place}.w": torch.full((3, width), float(place), dtype=dtype) for place in range(leaves)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_small_leaves_come_back_in_one_block_of_their_own(dtype: torch.dtype) -> None:
    data = safetensors_io.to_bytes({"params": many(dtype)}, "{}")
    (_, one), (_, other) = safetensors_io.from_bytes(data), safetensors_io.from_bytes(data)
    params = one["params"]
    assert isinstance(params, FlatTree) and len(params.blocks) == 1
    assert all(leaf.data_ptr() % ALIGNMENT == 0 for leaf in params.values())
    assert tree.equal(params, many(dtype)) and params.alike(flatten(many(dtype)))
    params["layer.0.w"].add_(1)
    assert tree.equal(other["params"], many(dtype)) and tree.equal(
        safetensors_io.from_bytes(data)[1]["params"], many(dtype)
    )


def test_large_leaves_come_back_alone() -> None:
    large = many(leaves=2, width=1 << 17)
    _, back = safetensors_io.from_bytes(safetensors_io.to_bytes({"params": large}, "{}"))
    assert not isinstance(back["params"], FlatTree) and tree.equal(back["params"], large)


def test_a_bundle_is_written_as_its_leaves_are_whatever_else_is_made_of_it() -> None:
    leaves = many()
    for made in (flatten(leaves), tree.scale(flatten(leaves), 2.0), tree.stack([flatten(leaves)])):
        assert isinstance(made, FlatTree)
        assert safetensors_io.to_bytes({"p": made}, "") == safetensors_io.to_bytes({"p": dict(made)}, "")


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def file_of(header: Any, values: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + values


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [3]},
        {"shape": [2, -1]},
        {"shape": [2.0]},
        {"shape": [True, 2]},
        {"shape": "2"},
        {"shape": 2},
        {"shape": [0, 2**70], "data_offsets": [0, 0]},
        {"shape": [0, 2**64], "data_offsets": [0, 0]},
        {"shape": [0, 2**32, 2**31], "data_offsets": [0, 0]},
        {"shape": [2, *[1] * 64]},
        {"dtype": "F64"},
        {"dtype": "F31"},
        {"dtype": None},
        {"data_offsets": [4, 12]},
        {"data_offsets": [-8, 0]},
        {"data_offsets": [8, 0]},
        {"data_offsets": [0]},
        {"data_offsets": [0, 4, 8]},
        {"data_offsets": [0.0, 8.0]},
        {"data_offsets": [0, 2**70]},
        {"data_offsets": None},
    ],
)
def test_an_entry_that_lies_is_refused(changes: dict[str, Any]) -> None:
    head = {"__metadata__": {"fedllm": "x"}}
    text, back = safetensors_io.from_bytes(file_of({**head, "p/w": ENTRY}, bytes(8)))
    assert text == "x" and back["p"]["w"].tolist() == [0.0, 0.0]
    with pytest.raises(Exception) as caught:  # wire.unpack makes one sentence of any
        safetensors_io.from_bytes(file_of({**head, "p/w": {**ENTRY, **changes}}, bytes(8)))
    assert not isinstance(caught.value, AssertionError | MemoryError)


class Counted(int):
    """A size that counts how often it is multiplied, and the bits of what comes out."""

    work = 0

    def __rmul__(self, other: int) -> int:
        product = int(self) * int(other)
        Counted.work += product.bit_length()
        return product

    __mul__ = __rmul__


@pytest.mark.parametrize("axes", [100, 400])
def test_the_places_of_a_leaf_take_time_in_proportion_to_its_axes(axes: int) -> None:
    Counted.work = 0
    places, _, _ = layout.layout_of(
        {"w": ((*map(Counted, [1] * axes), Counted(2)), (torch.float32, torch.device("cpu")))}
    )
    assert places["w"][2] == (*[2] * axes, 1)
    assert axes <= Counted.work <= 6 * axes  # a product of two bits for each axis: of the size, and of the strides


@pytest.mark.parametrize("second", [[0, 8], [4, 12], [12, 20], [16, 24]])
def test_values_that_overlap_or_leave_a_hole_are_refused(second: list[int]) -> None:
    head = {"__metadata__": {"fedllm": "x"}, "p/w": ENTRY}
    assert safetensors_io.from_bytes(file_of({**head, "p/v": {**ENTRY, "data_offsets": [8, 16]}}, bytes(16)))
    with pytest.raises(ValueError, match=r"not where|cut off"):
        safetensors_io.from_bytes(file_of({**head, "p/v": {**ENTRY, "data_offsets": second}}, bytes(second[1])))


@pytest.mark.parametrize("key", ["w", "", "p"])
def test_a_key_without_a_prefix_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="not where"):
        safetensors_io.from_bytes(file_of({"__metadata__": {"fedllm": "x"}, key: ENTRY}, bytes(8)))


def test_metadata_may_stand_anywhere() -> None:
    text, back = safetensors_io.from_bytes(file_of({"p/w": ENTRY, "__metadata__": {"fedllm": "x"}}, bytes(8)))
    assert text == "x" and list(back["p"]) == ["w"]
    with pytest.raises(ValueError, match="no message of fedllm"):
        safetensors_io.from_bytes(file_of({"p/w": ENTRY}, bytes(8)))


@pytest.mark.parametrize("between", ["", ",,", ";", ",0,", "}", ",}"])
def test_what_stands_between_metadata_and_entries_is_json(between: str) -> None:
    entries = json.dumps({"p/w": ENTRY})[1:]
    for given_between in (",", between):
        header = f'{{"__metadata__":{{"fedllm":"x"}}{given_between}{entries}'.encode()
        content = struct.pack("<Q", len(header)) + header + bytes(8)
        if given_between == ",":
            assert safetensors_io.from_bytes(content)[0] == "x"
            continue
        with pytest.raises(ValueError):
            safetensors_io.from_bytes(content)


def test_of_a_header_that_came_before_values_and_text_are_its_own() -> None:
    """Entries are worked out once for all messages of a form."""
    for value in (1.0, 2.0):
        for leaves in (2, 3):
            held = {"p": {name: leaf + value for name, leaf in many(leaves=leaves).items()}}
            text, back = safetensors_io.from_bytes(safetensors_io.to_bytes(held, f"{value} {leaves}"))
            assert text == f"{value} {leaves}" and tree.equal(back["p"], held["p"])


@pytest.mark.parametrize("letters", [3, layout.REMEMBERED])
def test_entries_of_a_long_header_are_not_kept(letters: int) -> None:
    safetensors_io._entries.cache_clear()
    for _ in range(2):
        _, back = safetensors_io.from_bytes(safetensors_io.to_bytes({"p": {"x" * letters: torch.ones(2)}}, ""))
        assert list(back["p"]) == ["x" * letters]
    assert safetensors_io._entries.cache_info().hits == (letters < 100)


@settings(max_examples=300)
@given(st.data())
def test_what_the_library_refuses_is_refused(data: st.DataObject) -> None:
    """Bytes of header and values that are changed at random."""
    content = bytearray(safetensors_io.to_bytes({"p": many(leaves=3), "q": {"n": torch.tensor(3)}}, "{}"))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, 400))] = data.draw(st.integers(0, 255))
    try:
        expected = load(bytes(content))
    except Exception:
        with pytest.raises(Exception):  # noqa: B017
            safetensors_io.from_bytes(bytes(content))
        return
    try:
        _, back = safetensors_io.from_bytes(bytes(content))
    except Exception:
        return  # no message of fedllm, or a type that it does not send
    assert tree.digest(tree.add_prefix(**back)) == tree.digest(expected)
