"""Trees as a safetensors file in memory, and back: many small leaves take the library itself several times as long.

    8 bytes length | JSON: `__metadata__` (a text), KEY -> dtype, shape, data_offsets | values     KEY = PREFIX/LEAF

Wide types come first, then names in order, as safetensors writes them, so that every value lies at a multiple of its
size. Leaves that are read are `bundled`.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch

from fedllm.bundle import Shape, forms, in_bytes, of_bytes
from fedllm.errors import WireError
from fedllm.tree import Tree

# In the order in which a file holds them.
TYPES: Mapping[torch.dtype, str] = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
PLACES = {dtype: place for place, dtype in enumerate(TYPES)}
DTYPES = {name: dtype for dtype, name in TYPES.items()}
METADATA = "__metadata__"


def written(trees: Mapping[str, Tree], text: str) -> bytes:
    """The file of some trees by their prefixes, and of a text; byte for byte as safetensors writes it."""
    leaves = [
        (PLACES[form[0]], f"{prefix}/{name}", form, memory)
        for prefix, tree in trees.items()
        for (name, form), memory in zip(forms(tree).items(), in_bytes(tree), strict=True)
    ]
    leaves.sort(key=lambda leaf: leaf[:2])
    header: dict[str, object] = {METADATA: {"fedllm": text}}
    start = 0
    for _, key, (dtype, shape), memory in leaves:
        end = start + len(memory)
        header[key] = {"dtype": TYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    return b"".join([len(head).to_bytes(8, "little"), head, *(memory for _, _, _, memory in leaves)])


def read(data: bytes) -> tuple[str, defaultdict[str, Tree]]:
    """The text of a file, and its trees in memory of their own.

    Raises:
        Exception: of whatever type; bytes from elsewhere may be wrong in any way.
        WireError: they are a file of tensors, but not of fedllm, or the values are not where the header has them.
    """
    first = 8 + int.from_bytes(data[:8], "little")
    header: dict[str, dict[str, Any]] = json.loads(data[8:first])
    metadata, values = header.pop(METADATA, {}), memoryview(data)[first:]
    leaves: defaultdict[str, dict[str, tuple[Shape, torch.dtype, memoryview]]] = defaultdict(dict)
    end = 0
    for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (start, stop) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        counted = "/" in key and all(type(number) is int and number >= 0 for number in (start, *shape))
        if not counted or start != end or stop != start + math.prod(shape) * dtype.itemsize:
            raise WireError(f"a message could not be read: the values of '{key}' are not where its header has them")
        prefix, _, name = key.partition("/")
        leaves[prefix][name] = (shape, dtype, values[start:stop])
        end = stop
    if first + end != len(data):
        raise WireError("a message could not be read: it is cut off, or something stands behind it")
    if not isinstance(metadata.get("fedllm"), str):
        raise WireError("the bytes are a safetensors file, but no message of fedllm; send what wire.pack makes")
    return metadata["fedllm"], defaultdict(dict, {prefix: of_bytes(held) for prefix, held in leaves.items()})
