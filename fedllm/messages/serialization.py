"""Requests, updates and failures as bytes, and back. No pickle: a safetensors file (`safetensors_io`).

Its text is JSON: the kind of message, the facts of the step, weights and wire formats of the parts. Tensor keys of a
request: `params/LEAF`, `extra0/LEAF` for the first stage's extra and `steps3/LEAF` for what version 3 of the frozen
weights adds; of an update: `part0/LEAF` for the first part of the header. A packed tensor is stored as `part0/LEAF`
(codes, or values) and `scale0/LEAF` or `index0/LEAF`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import ConfigDict, Field, TypeAdapter
from torch import Tensor

from fedllm.errors import WireError
from fedllm.messages.context import RoundContext
from fedllm.messages.update import Asked, Failure, Part, Request, Update
from fedllm.tensors import safetensors_io, tree, wire_format
from fedllm.tensors.base_delta import BaseDelta
from fedllm.tensors.flat_tree import FlatTree
from fedllm.tensors.layout import LeafSpec
from fedllm.tensors.tree import Tree
from fedllm.tensors.wire_format import IndexSelection, Window, WireFormat

Message = Request | Update | Failure

# Where nobody knows what was asked for, a message unfolds to no more values than this for each of its bytes.
MOST_VALUES_PER_BYTE = 250  # one float32 in 2000 is sent

Count = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class _Part:
    """A part without its values. `shapes` are those of the packed tensors; `windows` the boxes of those with one, and
    `picks` the axis and the indices of those with an `IndexSelection`.

    With `bits` every packed tensor is in codes, those of its window; without, a packed tensor has a window.
    """

    weight: Weight | None
    sparse: bool = False
    bits: Literal[8, 4, 1] | None = None
    block: Annotated[int, Field(ge=1)] = 128
    shapes: dict[str, list[Count]] = field(default_factory=dict)
    windows: dict[str, list[list[Count]]] = field(default_factory=dict)
    picks: dict[str, tuple[Count, list[Count]]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Request:
    """A request without its values. `extras`: how many tensors each has. `steps`: versions of the base delta, `after`
    which one."""

    ctx: RoundContext
    extras: list[Count]
    steps: list[Count] = field(default_factory=list)
    after: Count = 0
    kind: Literal["request"] = "request"


@dataclass(frozen=True)
class _Update:
    parts: dict[str, _Part]
    kind: Literal["update"] = "update"


@dataclass(frozen=True)
class _Failure:
    failure: Failure
    kind: Literal["failure"] = "failure"


_Header = _Request | _Update | _Failure
_HEADER: TypeAdapter[_Header] = TypeAdapter(
    Annotated[_Header, Field(discriminator="kind")],
    config=ConfigDict(ser_json_inf_nan="constants"),  # so that whoever reads it refuses it
)


def serialize(message: Message) -> bytes:
    """A message to bytes. Every value, integers included, comes back with the same bits.

    One thing is not kept: a zero of a packed part comes back as +0.
    """
    trees: dict[str, Tree] = {}
    header: _Header
    match message:
        case Request():
            trees["params"] = message.params
            trees |= {f"extra{place}": extra for place, extra in enumerate(message.extras)}
            trees |= {f"steps{version}": step for version, step in message.base_delta.steps.items()}
            extras, steps = [len(extra) for extra in message.extras], list(message.base_delta.steps)
            header = _Request(message.ctx, extras, steps, message.base_delta.after)
        case Update():
            for place, part in enumerate(message.parts.values()):
                trees |= _laid_out(place, part)
            header = _Update({name: _without_values(part) for name, part in message.parts.items()})
        case Failure():
            # a reason may name a file by bytes that are no text
            reason = message.reason.encode(errors="backslashreplace").decode()
            header = _Failure(replace(message, reason=reason))
    return safetensors_io.to_bytes(trees, str(_HEADER.dump_json(header), "utf-8"))


def deserialize(data: bytes, asked: Asked | None = None) -> Message:
    """Bytes to a message, in memory of its own. Nothing in them is code, and they are believed in nothing.

    Time and memory follow from the number of bytes, or from what was asked for, and not from what a header claims.

    Args:
        asked: what an update may hold. None: this is not known.

    Raises:
        WireError: the bytes are cut off, do not hold what their header says, or are not what was asked for.
    """
    try:
        text, trees = safetensors_io.from_bytes(data)
        message = _read(_HEADER.validate_json(text, strict=True), trees, len(data), asked)
    except WireError as error:  # it may name tensors, whose names come from elsewhere, too
        raise WireError(_short(str(error))) from error
    except Exception as error:  # bytes from elsewhere may be wrong in any way
        reason = _short(f"{type(error).__name__}: {error}")
        raise WireError(f"a message could not be read ({reason}); both sides need the same fedllm") from error
    return message


def _short(sentence: str) -> str:
    line = " ".join(sentence.split())
    return line if len(line) <= 200 else f"{line[:200]}..."


def part_bytes(message: Message) -> dict[str, int]:
    """Bytes of the values per part, as they stand on the wire (`wire_format.num_bytes`); headers are not in them."""
    if isinstance(message, Request):
        sizes = {
            "params": tree.num_bytes(message.params),
            "extras": sum(map(tree.num_bytes, message.extras)),
            "base_delta": message.base_delta.num_bytes,
        }
        return {name: size for name, size in sizes.items() if size}
    if isinstance(message, Update):
        return {name: wire_format.num_bytes(part.tree, part.wire_format) for name, part in message.parts.items()}
    return {}


def _without_values(part: Part) -> _Part:
    form = part.wire_format
    if form.sparse:
        return _Part(part.weight, sparse=True, shapes={name: list(leaf.shape) for name, leaf in part.tree.items()})
    if form.bits is None and not form.windows:
        return _Part(part.weight)
    assert form.bits in (8, 4, 1, None), form.bits
    packed = form.windows if form.bits is None else form.scales
    shapes = {name: list(leaf.shape) for name, leaf in part.tree.items() if name in packed}
    held = {name: form.windows[name] for name in shapes if name in form.windows}
    windows = {name: [*map(list, box)] for name, box in held.items() if not isinstance(box, IndexSelection)}
    picks = {
        name: (found.axis, list(found.places)) for name, found in held.items() if isinstance(found, IndexSelection)
    }
    return _Part(part.weight, False, form.bits, form.block, shapes, windows, picks)  # type: ignore[arg-type]


def _laid_out(place: int, part: Part) -> dict[str, Tree]:
    """The trees that stand for a part on the wire."""
    form, key = part.wire_format, f"part{place}"
    if not form.sparse and form.bits is None and not form.windows:
        return {key: part.tree}
    trees: defaultdict[str, Tree] = defaultdict(dict)
    for name, held in part.tree.items():
        whole = held.detach().cpu()
        leaf = whole if form.sparse else wire_format.read_window(whole, form.windows.get(name))
        kept = leaf is whole or int(leaf.count_nonzero()) == int(whole.count_nonzero())
        assert kept, f"{key}/{name} has values outside of its window"
        if form.sparse:
            assert leaf.numel() < 1 << 31, "a position is an int32"
            flat = leaf.reshape(-1)
            index = flat.nonzero().reshape(-1)
            trees[key][name] = flat[index]
            trees[f"index{place}"][name] = index.to(torch.int32)
        elif form.bits is not None and name in form.scales:
            scales = form.scales[name].cpu()
            codes = wire_format.codes(leaf, scales, form.block)
            packed = wire_format.pack_bits(codes.reshape(-1)[: leaf.numel()], form.bits)
            assert torch.equal(_decoded(packed, scales, leaf.shape, form), leaf), f"{key}/{name} is not on its grid"
            trees[key][name] = packed
            trees[f"scale{place}"][name] = scales
        else:
            trees[key][name] = leaf
    return trees


def _read(header: _Header, trees: defaultdict[str, Tree], size: int, asked: Asked | None) -> Message:
    held = sum(map(len, trees.values()))
    match header:
        case _Request():
            extras = tuple(trees[f"extra{place}"] for place in range(len(header.extras)))
            _demand([len(extra) for extra in extras] == header.extras, "its extras have other tensors than it says")
            params, base_delta = trees["params"], _base_delta(header, trees)
            known = len(params) + sum(header.extras) + sum(map(len, base_delta.steps.values()))
            _demand(known == held, "it holds values that belong to no tree")
            return Request(params, extras, header.ctx, base_delta)
        case _Update():
            entries = header.parts.values()
            _unfolds(header.parts, MOST_VALUES_PER_BYTE * size, asked)
            parts = {name: _part(place, entry, trees) for place, (name, entry) in enumerate(header.parts.items())}
            paired = sum(len(entry.shapes) for entry in entries if entry.sparse or entry.bits)  # each is stored as two
            known = sum(len(part.tree) for part in parts.values()) + paired
            _demand(known == held, "it holds values that belong to no part")
            if asked is not None:
                for name, part in parts.items():
                    _suits(name, tree.forms(part.tree), asked)
            return Update(parts)
        case _Failure():
            _demand(not held, "a failure holds no values")
            return header.failure


def _unfolds(entries: Mapping[str, _Part], most: int, asked: Asked | None) -> None:
    """Check the shapes of packed tensors before memory is spent on them: each is the one that was asked for, or those
    that are filled up with zeros hold at most so many values together."""
    zeros = 0
    for part, entry in entries.items():
        filled = entry.sparse or entry.windows or entry.picks
        known = {} if asked is None else asked.get(part, {})
        for name, shape in entry.shapes.items():
            if name in known:
                _demand(tuple(shape) == known[name][1], f"{part}/{name} has another shape than was asked for: {shape}")
            else:
                zeros += safetensors_io.num_values(shape) * bool(filled)
    _demand(zeros <= most, f"it would unfold to {zeros} values")


def _suits(part: str, forms: Mapping[str, LeafSpec], asked: Asked) -> None:
    """Check a part against what was asked for."""
    _demand(part in asked, f"it has a part '{part}', which nobody asked for")
    wanted = asked[part]
    if forms == wanted:
        return
    for name in sorted(forms.keys() | wanted.keys()):
        _demand(name in forms, f"its part '{part}' lacks {name}")
        _demand(name in wanted, f"it has {part}/{name}, which nobody asked for")
        fault = f"{part}/{name} is {_written(*forms[name])} in place of {_written(*wanted[name])}"
        _demand(forms[name] == wanted[name], fault)


def _written(dtype: torch.dtype, shape: Sequence[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def _base_delta(header: _Request, trees: Mapping[str, Tree]) -> BaseDelta:
    rising = all(low < high for low, high in pairwise([header.after, *header.steps]))
    _demand(rising, "the versions of its base delta do not rise")
    return BaseDelta({version: trees[f"steps{version}"] for version in header.steps}, header.after)


def _part(place: int, entry: _Part, trees: Mapping[str, Tree]) -> Part:
    leaves, scales = trees[f"part{place}"], dict[str, Tensor]()
    if entry.bits is not None:
        codes, grid = (_pieces(held, entry.shapes) for held in (leaves, trees[f"scale{place}"]))
        _demand(wire_format.on_grid(codes, grid, entry.bits), "it has codes or scales that no grid has")
    if entry.shapes:
        leaves = dict(leaves)  # some are unfolded, and a flat tree takes no others
    _demand(entry.windows.keys() | entry.picks.keys() <= entry.shapes.keys(), "a window has no shape")
    _demand(not entry.windows.keys() & entry.picks.keys(), "a tensor has two windows")
    windows = {name: _window(edges, entry.shapes[name]) for name, edges in entry.windows.items()}
    windows |= {name: _picks(*found, entry.shapes[name]) for name, found in entry.picks.items()}
    for name, shape in entry.shapes.items():
        box = _held(windows.get(name), shape)
        if entry.sparse:
            leaves[name] = _spread(leaves[name], trees[f"index{place}"][name], shape)
        elif entry.bits is not None:
            scales[name] = trees[f"scale{place}"][name]
            leaves[name] = _decoded(leaves[name], scales[name], box, entry)
        _demand(list(leaves[name].shape) == box, "a window does not have its values")
        leaves[name] = wire_format.write_window(leaves[name], windows.get(name), torch.Size(shape))
    _demand(not entry.sparse or leaves.keys() == entry.shapes.keys(), "a sparse tensor has no shape")
    return Part(leaves, entry.weight, WireFormat(entry.sparse, entry.bits, entry.block, scales, windows))


def _pieces(held: Tree, names: Mapping[str, object]) -> Sequence[Tensor]:
    """Some tensors; the buffers of a flat tree, where these are all of its tensors: zeros lie between them."""
    if isinstance(held, FlatTree) and held.keys() == names.keys():
        return held.blocks
    return [held[name] for name in names]


def _window(edges: Sequence[Sequence[int]], shape: Sequence[int]) -> Window:
    """A box that lies in a tensor of this shape."""
    pairs = len(edges) == len(shape) and all(len(pair) == 2 for pair in edges)
    within = pairs and all(pair[0] <= pair[1] <= size for pair, size in zip(edges, shape, strict=True))
    _demand(within, "a window does not lie in its tensor")
    return tuple((pair[0], pair[1]) for pair in edges)


def _picks(axis: int, places: Sequence[int], shape: Sequence[int]) -> Window:
    """Rising indices along an axis of a tensor of this shape."""
    within = axis < len(shape) and all(place < shape[axis] for place in places)
    rising = within and all(low < high for low, high in pairwise(places))
    _demand(rising, "the indices of a window do not rise within its tensor")
    return IndexSelection(axis, tuple(places))


def _held(window: Window | None, shape: Sequence[int]) -> list[int]:
    """The shape of a tensor's window."""
    if isinstance(window, IndexSelection):
        return [len(window.places) if axis == window.axis else size for axis, size in enumerate(shape)]
    return list(shape) if window is None else [stop - start for start, stop in window]


def _spread(values: Tensor, index: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor of zeros with `values` at the positions `index`."""
    count = math.prod(shape)
    paired = index.dtype == torch.int32 and values.dim() == 1 and values.shape == index.shape
    _demand(paired, "a sparse tensor does not have one position for each value")
    inside = not len(index) or (int(index[0]) >= 0 and int(index[-1]) < count)
    _demand(inside and bool((index[1:] > index[:-1]).all()), "the positions of a sparse tensor do not rise within it")
    dense = torch.zeros(count, dtype=values.dtype)
    dense[index.long()] = values
    return dense.reshape(shape)


def _decoded(packed: Tensor, scales: Tensor, shape: Sequence[int], form: WireFormat | _Part) -> Tensor:
    """The values of a tensor's codes."""
    count, bits = math.prod(shape), form.bits
    assert bits is not None, "shapes without a wire format"
    block = min(form.block, max(1, count))  # a long block is not filled up: its length is only a claim
    fits = packed.shape == (-(-count * bits // 8),) and packed.dtype == (torch.int8 if bits == 8 else torch.uint8)
    left = 8 * packed.numel() - count * bits  # of the last byte
    fits = fits and not (left and int(packed[-1]) >> (8 - left))
    fits = fits and scales.shape == (-(-count // block),) and scales.is_floating_point()
    _demand(fits, f"a tensor of shape {tuple(shape)} does not have its codes and scales")
    return wire_format.values(
        wire_format.quantization_blocks(wire_format.unpack_bits(packed, bits, count), block), scales, torch.Size(shape)
    )


def _demand(held: bool, fault: str) -> None:
    if not held:
        raise WireError(f"a message could not be read: {fault}")
