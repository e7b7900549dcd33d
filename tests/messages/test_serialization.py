"""Messages as bytes: the same bits back, sizes by hand, and nothing but `WireError` for anything else."""

from __future__ import annotations

import json
import math
import random
import re
import resource
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fedllm.errors import WireError
from fedllm.messages import serialization
from fedllm.messages.context import Profile, RoundContext
from fedllm.messages.update import Asked, Failure, Part, Request, Update
from fedllm.rng import Key
from fedllm.tensors import tree, wire_format
from fedllm.tensors.base_delta import BaseDelta
from fedllm.tensors.tree import Tree
from fedllm.tensors.wire_format import DENSE, SPARSE, IndexSelection, Window, WireFormat

DTYPES = (
    *(torch.float32, torch.float64, torch.bfloat16, torch.float16),
    *(torch.int8, torch.int32, torch.int64, torch.uint8, torch.bool),
)
NAMES = st.one_of(
    st.sampled_from(
        ["a", "model.layers.0.lora_A", "part0/a", "index0/a", "scale/a/b", "params/a", "", "/", "__metadata__"]
    ),
    st.text(max_size=5),
)
COUNTS = st.integers(0, 2**62)


@st.composite
def leaves(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Tensor:
    """Any bits of any type: NaN with its payload, -0, subnormals, 0-d, empty, transposed."""
    dtype = draw(st.sampled_from(dtypes))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    size = math.prod(shape) * dtype.itemsize
    data = bytearray(draw(st.binary(min_size=size, max_size=size)))
    if dtype is torch.bool:
        data = bytearray(byte & 1 for byte in data)
    flat = torch.frombuffer(data, dtype=dtype) if size else torch.zeros(0, dtype=dtype)
    leaf = flat.reshape(shape)
    return leaf.transpose(0, -1) if len(shape) > 1 and draw(st.booleans()) else leaf


def trees(dtypes: tuple[torch.dtype, ...] = DTYPES) -> st.SearchStrategy[Tree]:
    return st.dictionaries(NAMES, leaves(dtypes), max_size=3)


@st.composite
def quantized(draw: st.DrawFn) -> tuple[Tree, WireFormat]:
    """A tree whose floating leaves lie on a grid. Its integers are left as they are."""
    bits, block = draw(st.sampled_from([8, 4, 1])), draw(st.integers(1, 9))
    top = wire_format.levels(bits)
    codes = st.sampled_from([-1, 1]) if bits == 1 else st.integers(-top, top)
    found: Tree = {}
    scales: Tree = {}
    for name, leaf in draw(trees((torch.float32, torch.float64, torch.int64))).items():
        found[name] = leaf
        if leaf.is_floating_point():
            rows = -(-leaf.numel() // block)
            sizes = st.lists(st.sampled_from([0.0, 0.1, 3e-40, 1e30]), min_size=rows, max_size=rows)
            drawn = draw(st.lists(codes, min_size=rows * block, max_size=rows * block))
            scales[name] = torch.tensor(draw(sizes), dtype=leaf.dtype)
            grid = torch.tensor(drawn, dtype=torch.int8).reshape(rows, block)
            found[name] = wire_format.values(grid, scales[name], leaf.shape)
    return found, WireFormat(bits=bits, block=block, scales=scales)


@st.composite
def picked(draw: st.DrawFn, shape: torch.Size) -> IndexSelection:
    """Some places, or none, of an axis of a leaf that has one."""
    axis = draw(st.integers(0, len(shape) - 1))
    return IndexSelection(axis, tuple(place for place in range(shape[axis]) if draw(st.booleans())))


@st.composite
def windowed(draw: st.DrawFn, weight: float | None) -> Part:
    """Leaves that are zero outside of a box, or of some places of an axis."""
    held, windows = draw(trees()), {}
    for name, leaf in held.items():
        if leaf.dim() and draw(st.booleans()):
            windows[name] = draw(picked(leaf.shape))
        else:
            windows[name] = tuple(tuple(sorted(draw(st.tuples(*[st.integers(0, size)] * 2)))) for size in leaf.shape)
        held[name] = wire_format.write_window(wire_format.read_window(leaf, windows[name]), windows[name], leaf.shape)
    return Part(held, weight, WireFormat(windows=windows))


@st.composite
def windowed_bits(draw: st.DrawFn, weight: float | None) -> Part:
    """Leaves on a grid, some of them at a place, or at places of an axis, among zeros."""
    boxes, form = draw(quantized())
    held: Tree = dict(boxes)
    windows: dict[str, Window] = {}
    for name in form.scales:
        if boxes[name].dim() and draw(st.booleans()):
            axis, shape = draw(st.integers(0, boxes[name].dim() - 1)), list(boxes[name].shape)
            gaps = draw(st.lists(st.integers(1, 3), min_size=shape[axis], max_size=shape[axis]))
            windows[name] = IndexSelection(axis, tuple(sum(gaps[: place + 1]) - 1 for place in range(shape[axis])))
            shape[axis] = sum(gaps) + draw(st.integers(0, 2))
            held[name] = wire_format.write_window(boxes[name], windows[name], torch.Size(shape))
        elif draw(st.booleans()):
            first = draw(st.lists(st.integers(0, 3), min_size=boxes[name].dim(), max_size=boxes[name].dim()))
            windows[name] = tuple((at, at + size) for at, size in zip(first, boxes[name].shape, strict=True))
            shape = torch.Size(stop + draw(st.integers(0, 2)) for _, stop in windows[name])
            held[name] = wire_format.write_window(boxes[name], windows[name], shape)
    return Part(held, weight, replace(form, windows=windows))


@st.composite
def parts(draw: st.DrawFn) -> Part:
    weight = draw(st.one_of(st.none(), st.just(0.0), st.floats(0, 1e300)))
    kind = draw(st.sampled_from(["dense", "sparse", "bits", "window", "window of bits"]))
    if kind == "window":
        return draw(windowed(weight))
    if kind == "window of bits":
        return draw(windowed_bits(weight))
    if kind == "bits":
        held, form = draw(quantized())
        return Part(held, weight, form)
    held = draw(trees())
    if kind == "dense":
        return Part(held, weight, DENSE)
    # the zeros of a sparse part are +0
    return Part(
        tree.map_leaves(lambda leaf: torch.where(leaf == 0, torch.zeros_like(leaf), leaf), held), weight, SPARSE
    )


CTXS = st.builds(
    RoundContext,
    round=COUNTS,
    key=st.builds(Key, st.integers(0, 2**64 - 1)),
    cohort=COUNTS,
    population=COUNTS,
    rounds=COUNTS,
    client=st.one_of(st.none(), st.text()),
    slot=COUNTS,
    profile=st.builds(
        Profile,
        rank=st.none() | st.integers(1, 2**62),
        device=st.text(),
        steps=st.none() | COUNTS,
        batch_size=st.none() | st.integers(1, 2**62),
        lr=st.none() | st.floats(0, 1e300),
    ),
)
SHIFTS = st.dictionaries(st.integers(3, 12), trees(), max_size=3).map(lambda s: BaseDelta(dict(sorted(s.items())), 2))
REQUESTS = st.builds(Request, trees(), st.lists(trees(), max_size=3).map(tuple), CTXS, SHIFTS)
UPDATES = st.builds(Update, st.dictionaries(NAMES, parts(), max_size=3))
FAILURES = st.builds(Failure, st.text(), COUNTS, st.text())


def same_bits(one: Tree, two: Tree) -> bool:
    return tree.digest(one) == tree.digest(two)


def assert_same(one: serialization.Message, two: serialization.Message) -> None:
    match one, two:
        case Request(), Request():
            assert one.ctx == two.ctx and same_bits(one.params, two.params)
            assert [tree.digest(extra) for extra in one.extras] == [tree.digest(extra) for extra in two.extras]
            assert (list(one.base_delta.steps), one.base_delta.after) == (
                list(two.base_delta.steps),
                two.base_delta.after,
            )
            assert all(map(same_bits, one.base_delta.steps.values(), two.base_delta.steps.values()))
        case Update(), Update():
            assert list(one.parts) == list(two.parts)
            for name, part in one.parts.items():
                other = two.parts[name]
                assert part.weight == other.weight and type(part.weight) is type(other.weight)
                assert same_bits(part.tree, other.tree), name
                assert (part.wire_format.sparse, part.wire_format.bits) == (
                    other.wire_format.sparse,
                    other.wire_format.bits,
                )
                assert same_bits(dict(part.wire_format.scales), dict(other.wire_format.scales))
                assert part.wire_format.windows == other.wire_format.windows
        case _:
            assert isinstance(one, Failure) and one == two


def header_bytes(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


@settings(max_examples=300)
@given(st.one_of(REQUESTS, UPDATES, FAILURES))
def test_every_message_comes_back_with_the_same_bits(message: serialization.Message) -> None:
    data = serialization.serialize(message)
    back = serialization.deserialize(data)
    assert_same(message, back)
    assert sum(serialization.part_bytes(message).values()) == len(data) - header_bytes(data)
    assert_same(message, serialization.deserialize(serialization.serialize(back)))


def test_nothing_collides_whatever_its_name() -> None:
    a, b, c = torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([3.0])
    update = Update(
        {
            "scale": Part({"PART/x": a, "x": b}, 1.0),
            "PART": Part({"x": 2 * a, "scale/PART/x": c}, 1.0, WireFormat(bits=8, block=1, scales={"x": 2 * a})),
            "PART/x": Part({"": b}, None, SPARSE),
            "index": Part({"PART/x/": c}, None, SPARSE),
            "": Part({}, 0.0),
            "part0": Part({"x": c}, 0.0),
        }
    )
    assert_same(update, serialization.deserialize(serialization.serialize(update)))
    request = Request({"extra0/x": a}, ({"x": b}, {}, {"params/x": c}), RoundContext(0, Key(0), 1, 1))
    assert_same(request, serialization.deserialize(serialization.serialize(request)))


def test_leaves_may_share_memory_and_be_views() -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    request = Request({"w": whole}, ({"w": whole}, {"row": whole[1], "t": whole.T}), RoundContext(0, Key(0), 1, 1))
    assert_same(request, serialization.deserialize(serialization.serialize(request)))
    wide = Update({"delta": Part({"e": torch.ones(1).expand(4), "g": torch.ones(2).requires_grad_()}, 1.0)})
    assert_same(wide, serialization.deserialize(serialization.serialize(wide)))


@pytest.mark.parametrize("form", ["dense", "sparse", "bits"])
def test_what_is_unpacked_is_writable_and_owns_its_memory(form: str) -> None:
    leaf = torch.tensor([0.0, 2.0, -4.0])
    forms = {"dense": DENSE, "sparse": SPARSE, "bits": WireFormat(bits=8, block=3, scales={"w": torch.tensor([2.0])})}
    sent = Update({"delta": Part({"w": leaf, "n": torch.tensor([7])}, 1.0, forms[form])})
    data = serialization.serialize(sent)
    copy = bytes(bytearray(data))
    for _ in range(2):  # the second time from the same bytes
        back = serialization.deserialize(data)
        assert isinstance(back, Update)
        held = back.parts["delta"].tree
        assert held["w"].tolist() == [0.0, 2.0, -4.0] and held["n"].tolist() == [7]
        held["w"].add_(1)
        held["n"].zero_()
    assert data == copy and leaf.tolist() == [0.0, 2.0, -4.0]


ROWS = torch.zeros(6, 7).index_fill(0, torch.tensor([1, 4]), 1.0)
TWO_ROWS = {"w": IndexSelection(0, (1, 4))}


@pytest.mark.parametrize(
    ("part", "size"),
    [
        (Part({"w": torch.ones(10, 7), "b": torch.ones(3, dtype=torch.bfloat16)}), 70 * 4 + 3 * 2),
        (Part({"w": torch.eye(10)}, wire_format=SPARSE), 10 * (4 + 4)),
        (Part({"w": torch.eye(10, dtype=torch.float64), "z": torch.zeros(99)}, wire_format=SPARSE), 10 * (4 + 8)),
        (Part({"w": torch.eye(9, dtype=torch.int8)}, wire_format=SPARSE), 9 * (4 + 1)),
        (Part({"w": -torch.zeros(9)}, wire_format=SPARSE), 0),
        (Part({"w": torch.eye(9)[:, :2]}, wire_format=WireFormat(windows={"w": ((0, 2), (0, 2))})), 4 * 4),
        (
            Part(
                {"w": ROWS, "v": ROWS.T}, wire_format=WireFormat(windows={**TWO_ROWS, "v": IndexSelection(1, (1, 4))})
            ),
            2 * 2 * 7 * 4,
        ),
        (Part({"w": 0 * ROWS}, wire_format=WireFormat(windows={"w": IndexSelection(1, ())})), 0),
        (
            Part({"w": ROWS}, wire_format=WireFormat(bits=4, block=4, scales={"w": torch.ones(4)}, windows=TWO_ROWS)),
            7 + 4 * 4,
        ),
    ],
)
def test_sizes_by_hand(part: Part, size: int) -> None:
    update = Update({"delta": part})
    assert serialization.part_bytes(update) == {"delta": size}
    data = serialization.serialize(update)
    assert len(data) - header_bytes(data) == size


def test_a_window_of_few_bits_by_hand() -> None:
    """3 x 5 values of 4 bits in a leaf of 8 x 6: 8 bytes of codes, two to a byte, and 4 for the scale of one block."""
    form = WireFormat(bits=4, block=16, scales={"w": torch.tensor([2.0])}, windows={"w": ((4, 7), (1, 6))})
    leaf = wire_format.write_window(torch.full((3, 5), -6.0), form.windows["w"], torch.Size([8, 6]))
    assert leaf.sum() == -90 and leaf[:4].count_nonzero() == 0 and leaf[:, 0].count_nonzero() == 0
    update = Update({"d": Part({"w": leaf}, 1.0, form)})
    data = serialization.serialize(update)
    assert serialization.part_bytes(update) == {"d": 12} and len(data) - header_bytes(data) == 12
    assert_same(update, serialization.deserialize(data))


@pytest.mark.parametrize("bits", [8, 4, 1])
@pytest.mark.parametrize(("count", "block"), [(256, 128), (257, 128), (1, 128), (1000, 64), (0, 128)])
def test_sizes_of_few_bits(bits: int, count: int, block: int) -> None:
    blocks = -(-count // block)
    leaf = wire_format.values(torch.ones(blocks, block, dtype=torch.int8), torch.ones(blocks), torch.Size([count]))
    update = Update({"d": Part({"w": leaf}, 1.0, WireFormat(bits=bits, block=block, scales={"w": torch.ones(blocks)}))})
    size = math.ceil(bits * count / 8) + 4 * blocks
    data = serialization.serialize(update)
    assert serialization.part_bytes(update) == {"d": size} and len(data) - header_bytes(data) == size


def test_bytes_of_requests_and_failures() -> None:
    request = Request(
        {"w": torch.ones(3)}, ({"c": torch.ones(2, dtype=torch.float64)}, {}), RoundContext(0, Key(0), 1, 1)
    )
    assert serialization.part_bytes(request) == {"params": 12, "extras": 16}
    assert serialization.part_bytes(replace(request, extras=())) == {"params": 12}
    assert serialization.part_bytes(Failure("a", 1, "gone")) == {}


def test_values_off_their_grid_are_not_rounded_in_silence() -> None:
    form = WireFormat(bits=8, block=2, scales={"w": torch.tensor([1.0])})
    with pytest.raises(AssertionError, match="grid"):
        serialization.serialize(Update({"d": Part({"w": torch.tensor([1.0, 1.5])}, 1.0, form)}))
    one = replace(form, bits=1)
    with pytest.raises(AssertionError, match="grid"):
        serialization.serialize(Update({"d": Part({"w": torch.tensor([1.0, 0.0])}, 1.0, one)}))


def test_values_outside_of_their_window_are_not_dropped_in_silence() -> None:
    for window in (((0, 2), (0, 3)), IndexSelection(1, (0, 2))):
        with pytest.raises(AssertionError, match="outside of its window"):
            serialization.serialize(Update({"d": Part({"w": torch.eye(3)}, 1.0, WireFormat(windows={"w": window}))}))


BOX_OF_BITS = WireFormat(bits=4, block=2, scales={"w": torch.ones(2)}, windows={"w": ((0, 2), (0, 2))})
EXAMPLES: tuple[serialization.Message, ...] = (
    Request({"w": torch.ones(3, 2)}, ({"c": torch.ones(2)}, {}), RoundContext(1, Key(2), 3, 4, client="Zoë")),
    Request(
        {"w": torch.ones(2)},
        (),
        RoundContext(1, Key(2), 3, 4),
        BaseDelta({3: {"l.lora_BA": torch.ones(2, 3)}}, after=2),
    ),
    Update(
        {
            "delta": Part({"w": torch.eye(3), "b": torch.ones(2)}, 2.0, SPARSE),
            "low": Part(
                {"w": torch.tensor([2.0, -4.0])}, 1.0, WireFormat(bits=4, block=2, scales={"w": torch.tensor([2.0])})
            ),
            "counts": Part({"n": torch.tensor(3)}, 0.0),
            "box": Part({"w": torch.eye(3)[:, :2]}, 1.0, WireFormat(windows={"w": ((0, 2), (0, 2))})),
            "low box": Part({"w": torch.eye(3)[:, :2]}, 1.0, BOX_OF_BITS),
            "rows": Part({"w": torch.eye(3)[:2].mT}, 1.0, WireFormat(windows={"w": IndexSelection(0, (0, 1))})),
            "low rows": Part({"w": ROWS}, 1.0, WireFormat(bits=4, scales={"w": torch.ones(1)}, windows=TWO_ROWS)),
        }
    ),
    Failure("a", 1, "gone"),
)


def refused(data: bytes, asked: Asked | None = None) -> str:
    """The sentence of the refusal."""
    with pytest.raises(WireError) as caught:
        serialization.deserialize(data, asked)
    assert type(caught.value) is WireError and "\n" not in str(caught.value) and len(str(caught.value)) < 400
    return str(caught.value)


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_every_truncation_is_refused(message: serialization.Message) -> None:
    data = serialization.serialize(message)
    for end in range(len(data)):
        refused(data[:end])
    refused(data + b"\0")


@settings(max_examples=300)
@given(st.sampled_from(EXAMPLES), st.data())
def test_a_flipped_byte_is_refused_or_is_another_message(message: serialization.Message, data: st.DataObject) -> None:
    content = bytearray(serialization.serialize(message))
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    try:
        found = serialization.deserialize(bytes(content))
    except WireError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(found, Request | Update | Failure)


@given(st.binary(max_size=200))
def test_noise_is_refused(content: bytes) -> None:
    refused(content)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94.",  # a pickle
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 40000) + b"[" * 40000,
        save({"w": torch.ones(2)}),
        save({"w": torch.ones(2)}, {"format": "pt"}),
        save({"w": torch.ones(2)}, {"fedllm": "[" * 40000}),
        save({}, {"fedllm": "null"}),
        save({}, {"fedllm": '{"kind": "__import__"}'}),
        save({}, {"fedllm": "not JSON"}),
    ],
)
def test_foreign_bytes_are_refused(content: bytes) -> None:
    refused(content)


def doctored(message: serialization.Message, change: Callable[[dict[str, Any], Tree], object]) -> bytes:
    """The bytes of a message whose header and values were changed by hand."""
    from safetensors.torch import load

    data = serialization.serialize(message)
    header = json.loads(json.loads(data[8 : header_bytes(data)])["__metadata__"]["fedllm"])
    tensors = load(data)
    change(header, tensors)
    return save(tensors, {"fedllm": json.dumps(header)})


def at(*path: str, value: Any) -> Callable[[dict[str, Any], Tree], object]:
    def change(header: dict[str, Any], tensors: Tree) -> None:
        place: Any = header
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return change


def put(**tensors: Tensor) -> Callable[[dict[str, Any], Tree], object]:
    return lambda header, held: held.update({name.replace("__", "/"): leaf for name, leaf in tensors.items()})


def i32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


REQUEST, MOVING, UPDATE, FAILURE = EXAMPLES
LIES: Mapping[str, tuple[serialization.Message, Callable[[dict[str, Any], Tree], object]]] = {
    "kind": (UPDATE, at("kind", value="request")),
    "versions that do not rise": (MOVING, at("steps", value=[2])),
    "a version without its leaves": (MOVING, at("steps", value=[4])),
    "no kind": (UPDATE, lambda header, tensors: header.pop("kind")),
    "no parts": (UPDATE, lambda header, tensors: header.pop("parts")),
    "part left out": (UPDATE, lambda header, tensors: header["parts"].pop("counts")),
    "part too many": (UPDATE, at("parts", "more", value={"weight": 1.0, "sparse": True, "shapes": {"w": [3]}})),
    "weight is text": (UPDATE, at("parts", "delta", "weight", value="2.0")),
    "weight below 0": (UPDATE, at("parts", "delta", "weight", value=-1.0)),
    "weight is NaN": (UPDATE, at("parts", "delta", "weight", value=math.nan)),
    "weight is infinite": (UPDATE, at("parts", "delta", "weight", value=math.inf)),
    "no weight": (UPDATE, lambda header, tensors: header["parts"]["delta"].pop("weight")),
    "not sparse": (UPDATE, at("parts", "delta", "sparse", value=False)),
    "other sparse shape": (UPDATE, at("parts", "delta", "shapes", "w", value=[2, 2])),
    "shape below 0": (UPDATE, at("parts", "delta", "shapes", "w", value=[-3, -3])),
    "shape is text": (UPDATE, at("parts", "delta", "shapes", "w", value=["3", "3"])),
    "shape is a fraction": (UPDATE, at("parts", "delta", "shapes", "w", value=[3, 3.0])),
    "huge shape": (UPDATE, at("parts", "delta", "shapes", "w", value=[2**31 - 1])),
    "huger shape": (UPDATE, at("parts", "delta", "shapes", "w", value=[2**40, 2**40])),
    "overflowing shape": (UPDATE, at("parts", "delta", "shapes", "w", value=[2**32, 2**32])),
    "many huge shapes": (UPDATE, at("parts", "delta", "shapes", value={"w": [1 << 25], "b": [1 << 25, 2]})),
    "sparse leaf without a shape": (UPDATE, lambda header, tensors: header["parts"]["delta"]["shapes"].pop("b")),
    "dense leaf in a sparse part": (
        UPDATE,
        lambda header, tensors: (header["parts"]["delta"]["shapes"].pop("b"), tensors.pop("index0/b")),
    ),
    "index out of range": (UPDATE, put(index0__w=i32(0, 4, 9))),
    "index below 0": (UPDATE, put(index0__w=i32(-1, 4, 8))),
    "index twice": (UPDATE, put(index0__w=i32(0, 4, 4))),
    "index falls": (UPDATE, put(index0__w=i32(4, 0, 8))),
    "index is int64": (UPDATE, put(index0__w=i32(0, 4, 8).long())),
    "index is a fraction": (UPDATE, put(index0__w=torch.tensor([0.0, 4.0, 8.0]))),
    "index too short": (UPDATE, put(index0__w=i32(0, 4))),
    "index too long": (UPDATE, put(index0__w=i32(0, 4, 8, 8))),
    "index for one": (UPDATE, put(part0__w=torch.tensor(1.0), index0__w=torch.tensor(3, dtype=torch.int32))),
    "index is square": (UPDATE, put(part0__w=torch.ones(1, 3), index0__w=i32(0, 4, 8).reshape(1, 3))),
    "no index": (UPDATE, lambda header, tensors: tensors.pop("index0/w")),
    "bits": (UPDATE, at("parts", "low", "bits", value=8)),
    "bits unknown": (UPDATE, at("parts", "low", "bits", value=3)),
    "bits below 0": (UPDATE, at("parts", "low", "bits", value=-4)),
    "bits are text": (UPDATE, at("parts", "low", "bits", value="4")),
    "no bits": (UPDATE, lambda header, tensors: header["parts"]["low"].pop("bits")),
    "block 0": (UPDATE, at("parts", "low", "block", value=0)),
    "block too short": (UPDATE, at("parts", "low", "block", value=1)),
    "low shape": (UPDATE, at("parts", "low", "shapes", "w", value=[3])),
    "low huge shape": (UPDATE, at("parts", "low", "shapes", "w", value=[2**60])),
    "codes are signed": (UPDATE, put(part1__w=torch.tensor([1], dtype=torch.int8))),
    "codes are floats": (UPDATE, put(part1__w=torch.ones(1))),
    "codes too many": (UPDATE, put(part1__w=torch.ones(2, dtype=torch.uint8))),
    "scales too many": (UPDATE, put(scale1__w=torch.ones(2))),
    "scales are integers": (UPDATE, put(scale1__w=torch.ones(1, dtype=torch.int64))),
    "scale without a dimension": (UPDATE, put(scale1__w=torch.tensor(1.0))),
    "code below its grid": (UPDATE, put(part1__w=torch.tensor([0x18], dtype=torch.uint8))),
    "code of 8 bits below its grid": (
        UPDATE,
        lambda header, tensors: (
            header["parts"]["low"].update(bits=8),
            tensors.update({"part1/w": torch.tensor([1, -128], dtype=torch.int8)}),
        ),
    ),
    "code in the bits that are left": (
        UPDATE,
        lambda header, tensors: header["parts"]["low"]["shapes"].update(w=[1]),
    ),
    "scale is NaN": (UPDATE, put(scale1__w=torch.tensor([math.nan]))),
    "scale is infinite": (UPDATE, put(scale1__w=torch.tensor([math.inf]))),
    "scale is below 0": (UPDATE, put(scale1__w=torch.tensor([-2.0]))),
    "scale makes infinite values": (UPDATE, put(scale1__w=torch.tensor([3e38]))),
    "empty leaf of a huge shape": (UPDATE, at("parts", "delta", "shapes", "w", value=[0, 2**64])),
    "leaf with axes without end": (UPDATE, at("parts", "delta", "shapes", "w", value=[1] * 3000 + [9])),
    "no scales": (UPDATE, lambda header, tensors: tensors.pop("scale1/w")),
    "window too large": (UPDATE, at("parts", "box", "windows", "w", value=[[0, 4], [0, 2]])),
    "window elsewhere": (UPDATE, at("parts", "box", "windows", "w", value=[[0, 3], [0, 2]])),
    "window falls": (UPDATE, at("parts", "box", "windows", "w", value=[[2, 0], [0, 2]])),
    "window below 0": (UPDATE, at("parts", "box", "windows", "w", value=[[-1, 1], [0, 2]])),
    "window is flat": (UPDATE, at("parts", "box", "windows", "w", value=[[0, 2]])),
    "window is a corner": (UPDATE, at("parts", "box", "windows", "w", value=[[2], [2]])),
    "window is empty": (UPDATE, at("parts", "box", "windows", "w", value=[[], []])),
    "window of three": (UPDATE, at("parts", "box", "windows", "w", value=[[0, 1, 2], [0, 2]])),
    "window is text": (UPDATE, at("parts", "box", "windows", "w", value=[["0", "2"], [0, 2]])),
    "window of another": (UPDATE, at("parts", "box", "windows", value={"v": [[0, 2], [0, 2]]})),
    "no windows": (UPDATE, lambda header, tensors: header["parts"]["box"].pop("windows")),
    "picks of another axis": (UPDATE, at("parts", "rows", "picks", "w", value=[1, [0, 1]])),
    "picks of no axis": (UPDATE, at("parts", "rows", "picks", "w", value=[2, [0, 1]])),
    "picks below 0": (UPDATE, at("parts", "rows", "picks", "w", value=[0, [-1, 1]])),
    "picks fall": (UPDATE, at("parts", "rows", "picks", "w", value=[0, [1, 0]])),
    "picks twice": (UPDATE, at("parts", "rows", "picks", "w", value=[0, [1, 1]])),
    "picks too large": (UPDATE, at("parts", "rows", "picks", "w", value=[0, [1, 3]])),
    "picks too many": (UPDATE, at("parts", "rows", "picks", "w", value=[0, [0, 1, 2]])),
    "picks are text": (UPDATE, at("parts", "rows", "picks", "w", value=[0, "01"])),
    "picks of another": (UPDATE, at("parts", "rows", "picks", value={"v": [0, [0, 1]]})),
    "picks and a window": (UPDATE, at("parts", "rows", "windows", value={"w": [[0, 3], [0, 2]]})),
    "no picks": (UPDATE, lambda header, tensors: header["parts"]["rows"].pop("picks")),
    "low rows of one": (UPDATE, at("parts", "low rows", "picks", "w", value=[0, [1]])),
    "low rows without bits": (UPDATE, lambda header, tensors: header["parts"]["low rows"].pop("bits")),
    "huge leaf of picks": (UPDATE, at("parts", "rows", "shapes", "w", value=[3, 2**40])),
    "huge leaf of a window": (UPDATE, at("parts", "box", "shapes", "w", value=[2**40, 2])),
    "value too many": (UPDATE, put(part9__w=torch.ones(2))),
    "value outside": (UPDATE, put(w=torch.ones(2))),
    "extras left out": (REQUEST, at("extras", value=[])),
    "extras too many": (REQUEST, at("extras", value=[1, 0, 3])),
    "extras are a number": (REQUEST, at("extras", value=10**9)),
    "request value outside": (REQUEST, put(extra7__w=torch.ones(2))),
    "round is text": (REQUEST, at("ctx", "round", value="1")),
    "round is a fraction": (REQUEST, at("ctx", "round", value=1.5)),
    "client is a number": (REQUEST, at("ctx", "client", value=7)),
    "key is text": (REQUEST, at("ctx", "key", value="7")),
    "no key": (REQUEST, lambda header, tensors: header["ctx"].pop("key")),
    "rank is text": (REQUEST, at("ctx", "profile", value={"rank": "8", "device": "x"})),
    "rank is 0": (REQUEST, at("ctx", "profile", "rank", value=0)),
    "steps are a fraction": (REQUEST, at("ctx", "profile", "steps", value=2.5)),
    "steps are true": (REQUEST, at("ctx", "profile", "steps", value=True)),
    "steps below 0": (REQUEST, at("ctx", "profile", "steps", value=-1)),
    "batch size is 0": (REQUEST, at("ctx", "profile", "batch_size", value=0)),
    "batch size is text": (REQUEST, at("ctx", "profile", "batch_size", value="2")),
    "lr is text": (REQUEST, at("ctx", "profile", "lr", value="1e-3")),
    "lr is NaN": (REQUEST, at("ctx", "profile", "lr", value=math.nan)),
    "lr is infinite": (REQUEST, at("ctx", "profile", "lr", value=math.inf)),
    "reason is a list": (FAILURE, at("failure", "reason", value=["gone"])),
    "failure with values": (FAILURE, put(w=torch.ones(1))),
    "no client": (FAILURE, lambda header, tensors: header["failure"].pop("client")),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(lie: str) -> None:
    message, change = LIES[lie]
    serialization.deserialize(doctored(message, lambda header, tensors: None))
    data = doctored(message, change)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(data)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB: nothing huge was reserved


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_a_weight_that_is_no_number_is_not_taken_for_none(weight: float) -> None:
    with pytest.raises(WireError, match="finite number"):
        serialization.deserialize(serialization.serialize(Update({"delta": Part({"w": torch.ones(2)}, weight)})))


def test_a_reason_may_name_bytes_that_are_no_text() -> None:
    back = serialization.deserialize(serialization.serialize(Failure("a", 3, "no file na\udcefve.txt")))
    assert back == Failure("a", 3, "no file na\\udcefve.txt")


def test_a_long_block_is_only_a_claim() -> None:
    """Filling up one block of that length would take terabytes."""
    found = serialization.deserialize(doctored(UPDATE, at("parts", "low", "block", value=2**40)))
    assert isinstance(found, Update) and found.parts["low"].tree["w"].tolist() == [2.0, -4.0]


def test_newer_fields_are_passed_over() -> None:
    assert_same(UPDATE, serialization.deserialize(doctored(UPDATE, at("parts", "delta", "colour", value="red"))))
    assert_same(REQUEST, serialization.deserialize(doctored(REQUEST, at("ctx", "colour", value="red"))))


def sparse_of(size: int) -> Update:
    """A leaf of so many values, one of which is not zero."""
    leaf = torch.zeros(size, dtype=torch.bool)
    leaf[5] = True
    return Update({"a": Part({"w": leaf}, 1.0, SPARSE)})


def asked(update: Update) -> Asked:
    """What an update would be asked for as."""
    return {name: dict(tree.forms(part.tree)) for name, part in update.parts.items()}


def test_a_sparse_leaf_unfolds_as_far_as_the_message_is_long_or_was_asked_for() -> None:
    length = len(serialization.serialize(sparse_of(1 << 16)))  # a shape of five digits
    small, large = (
        sparse_of(serialization.MOST_VALUES_PER_BYTE * length),
        sparse_of(serialization.MOST_VALUES_PER_BYTE * length + 1),
    )
    assert len(serialization.serialize(small)) == len(serialization.serialize(large)) == length
    assert_same(small, serialization.deserialize(serialization.serialize(small)))
    assert "unfold" in refused(serialization.serialize(large))
    assert_same(large, serialization.deserialize(serialization.serialize(large), asked(large)))
    padded = small.having("b", small.parts["a"]).having("p", Part({"w": torch.zeros(length, dtype=torch.uint8)}, 1.0))
    assert_same(padded, serialization.deserialize(serialization.serialize(padded)))  # as long as two
    assert "another shape" in refused(serialization.serialize(large), asked(small))
    assert "unfold" in refused(serialization.serialize(large), {"b": asked(large)["a"]})


UNASKED: Mapping[str, tuple[Part, str]] = {
    "a leaf too many": (Part({"w": torch.ones(2, 3), "v": torch.ones(1)}, 1.0), "d/v, which nobody asked for"),
    "a leaf too few": (Part({}, 1.0), "its part 'd' lacks w"),
    "another name": (Part({"v": torch.ones(2, 3)}, 1.0), "d/v, which nobody asked for"),
    "another shape": (Part({"w": torch.ones(3, 2)}, 1.0), r"d/w is float32 \[3, 2\] in place of float32 \[2, 3\]"),
    "a shape that would be spread": (Part({"w": torch.ones(3)}, 1.0), r"d/w is float32 \[3\] in place of"),
    "another type": (Part({"w": torch.ones(2, 3).double()}, 1.0), r"d/w is float64 \[2, 3\] in place of float32"),
    "another sparse shape": (Part({"w": torch.ones(3, 2)}, 1.0, SPARSE), "d/w has another shape than was asked for"),
}


@pytest.mark.parametrize("case", UNASKED)
def test_an_update_that_was_not_asked_for_is_refused_by_itself(case: str) -> None:
    honest = Update({"d": Part({"w": torch.ones(2, 3)}, 1.0)})
    part, fault = UNASKED[case]
    data = serialization.serialize(Update({"d": part}))
    assert_same(honest, serialization.deserialize(serialization.serialize(honest), asked(honest)))
    assert_same(
        Update({}), serialization.deserialize(serialization.serialize(Update({})), asked(honest))
    )  # a part that it does not have
    serialization.deserialize(data)
    assert re.search(fault, refused(data, asked(honest)))
    assert "part 'd', which nobody asked for" in refused(data, {})


def test_what_is_asked_for_stays_with_the_server() -> None:
    request = Request({"w": torch.ones(2)}, (), RoundContext(0, Key(0), 1, 1))
    asking = replace(request, asks=lambda call: {})
    assert (
        asking == request
        and serialization.serialize(asking) == serialization.serialize(request)
        and request.asks("work") is None
    )


class Reserved(TorchDispatchMode):
    """Counts the bytes of memory that operations make; views are none."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage().data_ptr() for leaf in args if isinstance(leaf, Tensor)}
        for leaf in made if isinstance(made, list | tuple) else [made]:
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in given:
                self.bytes += leaf.untyped_storage().nbytes()
        return made


def cost(data: bytes) -> tuple[int, int, serialization.Message | None]:
    """Calls and bytes that it takes to read a message, and the message, unless it is refused."""
    calls, found = [0], None

    def count(frame: object, event: str, argument: object) -> None:
        calls[0] += event in ("call", "c_call")

    with Reserved() as reserved:
        sys.setprofile(count)
        try:
            found = serialization.deserialize(data)
        except WireError:
            pass
        finally:
            sys.setprofile(None)
    return calls[0], reserved.bytes, found


HOSTILE = (
    *(0, 1, 7, 128, 2**20, 2**31 - 1, 2**40, 2**62, 2**63, 2**64, 10**300, -1, 0.5, True, None, "w", {}),
    *([], [0], [2**18], [2**40, 0], [0, 2**64], [1] * 65, [1] * 900, [0, *[2] * 600], [2**31, 2**31], [[0, 1]] * 300),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the values of nested JSON stand."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(item, (*path, key))


def hostile(draw: random.Random) -> bytes:
    """The bytes of an honest message of which one or two claims are others."""
    data = serialization.serialize(draw.choice(EXAMPLES))
    end = header_bytes(data)
    header = json.loads(data[8:end])
    facts = json.loads(header["__metadata__"]["fedllm"])
    for _ in range(draw.randint(1, 2)):
        claims = draw.choice((facts, facts, header))
        *path, last = draw.choice([place for place in places(claims) if place[0] != "__metadata__"] or [("x",)])
        place: Any = claims
        for key in path:
            place = place[key]
        place[last] = deepcopy(draw.choice(HOSTILE))
    header["__metadata__"]["fedllm"] = json.dumps(facts)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[end:]


def test_no_claim_costs_more_than_its_bytes() -> None:
    """Calls and memory of 150 messages that lie; the memory is that of float64 at the most values for each byte."""
    taken = 0
    cost(serialization.serialize(EXAMPLES[2]))  # the first time imports more of torch
    for number in range(150):
        data = hostile(random.Random(number))
        calls, reserved, found = cost(data)
        assert calls < 2000 + 4 * len(data), number
        assert reserved <= (8 * serialization.MOST_VALUES_PER_BYTE + 64) * len(data), number
        if found is not None:
            assert_same(found, serialization.deserialize(serialization.serialize(found)))
            taken += 1
    assert 5 < taken < 50  # some claims are harmless


def test_the_cost_of_a_message_is_seen() -> None:
    """The control: calls and the float32 of a claim that is within the bound are counted."""
    calls, reserved, found = cost(doctored(UPDATE, at("parts", "delta", "shapes", "w", value=[2**18])))
    assert calls > 500 and reserved >= 4 * 2**18 and found is not None
