"""Requests, updates and failures as bytes, and back. No pickle: safetensors and one JSON header.

    safetensors file = 8 bytes length | JSON (names, types, shapes, `__metadata__`) | values

`__metadata__["fedllm"]` is JSON: the kind of message, the facts of the step, weights and packings of the parts.
Tensor keys: `params/NAME`, `extra0/NAME`, `PART/NAME`; a packed leaf is stored as `PART/NAME` (codes, or values)
plus `scale/PART/NAME` or `index/PART/NAME`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedllm import packing, tree
from fedllm.errors import WireError
from fedllm.packing import Packing
from fedllm.rng import Key
from fedllm.tree import Tree
from fedllm.update import Ctx, Failure, Part, Profile, Request, Update

Message = Request | Update | Failure


def pack(message: Message) -> bytes:
    """A message to bytes. Every value, integers included, comes back with the same bits."""
    match message:
        case Request():
            tensors = tree.join(params=message.params)
            for place, extra in enumerate(message.extras):
                tensors |= tree.join(**{f"extra{place}": extra})
            header: dict[str, Any] = {"kind": "request", "ctx": asdict(message.ctx), "extras": len(message.extras)}
        case Update():
            tensors = {}
            header = {"kind": "update", "parts": {}}
            for name, part in message.parts.items():
                header["parts"][name] = _part_header(part)
                tensors |= dict(_laid_out(name, part))
        case Failure():
            tensors, header = {}, {"kind": "failure", **asdict(message)}
    return save({name: leaf.contiguous() for name, leaf in tensors.items()}, {"fedllm": json.dumps(header)})


def unpack(data: bytes) -> Message:
    """Bytes to a message.

    Raises:
        WireError: the bytes are cut off, or do not hold what their header says.
    """
    try:
        tensors = load(data)
        header = json.loads(_metadata(data)["fedllm"])
        match header.pop("kind"):
            case "request":
                extras = tuple(tree.branch(tensors, f"extra{place}") for place in range(header["extras"]))
                return Request(tree.branch(tensors, "params"), extras, _ctx(header["ctx"]))
            case "update":
                parts = {name: _part(name, entry, tensors) for name, entry in header["parts"].items()}
                return Update(parts)
            case "failure":
                return Failure(**header)
            case other:
                raise WireError(f"a message of unknown kind {other!r} arrived")
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, AssertionError) as error:
        if isinstance(error, WireError):
            raise
        raise WireError(f"a message could not be read: {type(error).__name__}: {error}") from error


def part_bytes(message: Message) -> dict[str, int]:
    """Bytes of the values per part, as they stand on the wire; headers are not in them."""
    if isinstance(message, Request):
        sizes = {"params": tree.num_bytes(message.params), "extras": sum(map(tree.num_bytes, message.extras))}
        return {name: size for name, size in sizes.items() if size}
    if isinstance(message, Update):
        return {
            name: sum(leaf.numel() * leaf.element_size() for _, leaf in _laid_out(name, part))
            for name, part in message.parts.items()
        }
    return {}


def _part_header(part: Part) -> dict[str, Any]:
    entry: dict[str, Any] = {"weight": part.weight}
    if part.packing.sparse:
        entry |= {"sparse": True, "shapes": {name: list(leaf.shape) for name, leaf in part.tree.items()}}
    elif part.packing.bits is not None:
        shapes = {name: list(part.tree[name].shape) for name in part.packing.scales}
        entry |= {"bits": part.packing.bits, "block": part.packing.block, "shapes": shapes}
    return entry


def _laid_out(part_name: str, part: Part) -> Iterator[tuple[str, Tensor]]:
    """The tensors that stand for a part on the wire."""
    form = part.packing
    for name, leaf in part.tree.items():
        key = f"{part_name}/{name}"
        if form.sparse:
            index = leaf.reshape(-1).nonzero().reshape(-1)
            yield key, leaf.reshape(-1)[index]
            yield f"index/{key}", index.to(torch.int32)
        elif form.bits is not None and name in form.scales:
            codes = packing.codes(leaf, form.scales[name], form.block)
            yield key, packing.squeeze(codes.reshape(-1)[: leaf.numel()], form.bits)
            yield f"scale/{key}", form.scales[name]
        else:
            yield key, leaf


def _part(name: str, entry: Mapping[str, Any], tensors: Tree) -> Part:
    leaves = tree.branch(tensors, name)
    form = Packing(sparse=bool(entry.get("sparse")), bits=entry.get("bits"), block=entry.get("block", 128))
    scales = {}
    for leaf_name, shape in entry.get("shapes", {}).items():
        size = torch.Size(shape)
        if form.sparse:
            dense = torch.zeros(size.numel(), dtype=leaves[leaf_name].dtype)
            dense[tensors[f"index/{name}/{leaf_name}"].long()] = leaves[leaf_name]
            leaves[leaf_name] = dense.reshape(size)
        else:
            assert form.bits is not None
            scales[leaf_name] = tensors[f"scale/{name}/{leaf_name}"]
            codes = packing.unsqueeze(leaves[leaf_name], form.bits, size.numel())
            leaves[leaf_name] = packing.values(packing.blocks(codes, form.block), scales[leaf_name], size)
    weight = entry["weight"]
    return Part(leaves, None if weight is None else float(weight), Packing(form.sparse, form.bits, form.block, scales))


def _ctx(entry: Mapping[str, Any]) -> Ctx:
    facts = {**entry, "key": Key(**entry["key"]), "profile": Profile(**entry["profile"])}
    return Ctx(**facts)


def _metadata(data: bytes) -> dict[str, str]:
    length = int.from_bytes(data[:8], "little")
    metadata: dict[str, str] = json.loads(data[8 : 8 + length])["__metadata__"]
    return metadata
