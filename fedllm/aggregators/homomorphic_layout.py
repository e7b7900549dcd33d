"""An update as one vector of numbers for a homomorphic sum, and back.

    slot = round(x / g) 2^-20        g = bound x clients x 2^-37        so that |sum of slots| <= 2^17

The error of a ciphertext is about 2^-27 of a slot, and that of a sum of n of them sqrt(n) as much: rounding the sum to
multiples of 2^-20 takes it away. Weights, figures, and what is exact or on the grid of a bounded norm are digits of b
bits in slots of their own, clients 2^b <= 2^17. The first slot is 1: in a sum it is the number of clients.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedllm.aggregators.vector_layout import read_entries, require_entry
from fedllm.errors import ClientError, WireError
from fedllm.messages.update import CLEAR, FIGURES, Part, Update
from fedllm.tensors import ring

FRACTION = {"figure": 24, "exact": 40}  # bits of digits behind the point
SUM_BITS, FINE_BITS = 17, 20
TYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16", "int64", "int32")}
KINDS = ("plain", "figure", "exact", "grid")
NOTES = ("weight", "grid")  # of a part, in place of a type


@dataclass(frozen=True)
class Scale:
    """How numbers become slots, for sums over `clients`."""

    bound: float
    clients: int

    @property
    def grid(self) -> float:
        """g: entries are multiples of it."""
        return self.bound * max(1, self.clients) * 2.0 ** -(SUM_BITS + FINE_BITS)

    @property
    def base(self) -> int:
        """Bits of a digit.

        Raises:
            ClientError: too many clients.
        """
        found = SUM_BITS - math.ceil(math.log2(max(1, self.clients)))
        if found < 4:
            raise ClientError(f"a homomorphic sum has no room for {self.clients} clients; draw smaller cohorts")
        return found

    def digits(self, kind: str, dtype: str) -> int:
        """How many a number of a kind has."""
        bits = ring.GRID_BITS[TYPES[dtype]] + 2 if kind == "grid" else ring.WIDTH + 1
        return 1 if kind == "plain" else -(-bits // self.base)


@dataclass(frozen=True)
class Entry:
    """One tensor; or with `leaf` "" a number of its part: the weight, or the logarithm of its grid."""

    part: str
    leaf: str
    dtype: str
    shape: tuple[int, ...]
    kind: str

    @property
    def size(self) -> int:
        """Numbers of it."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class HomomorphicLayout:
    """What the slots stand for."""

    entries: tuple[Entry, ...]

    @staticmethod
    def of(update: Update) -> HomomorphicLayout:
        """Of an update, its part in the clear apart."""
        return HomomorphicLayout(tuple(_entries(update)))

    def length(self, scale: Scale) -> int:
        """Slots."""
        return 1 + sum(entry.size * scale.digits(entry.kind, entry.dtype) for entry in self.entries)

    def to_bytes(self) -> bytes:
        """As it is sent."""
        listed = [[e.part, e.leaf, e.dtype, list(e.shape), e.kind] for e in self.entries]
        return json.dumps(listed, separators=(",", ":")).encode()

    @staticmethod
    def read(data: bytes) -> HomomorphicLayout:
        """From its bytes.

        Raises:
            WireError: they are no layout.
        """
        return HomomorphicLayout(read_entries(data, _entry))

    def values(self, update: Update, scale: Scale) -> np.ndarray:
        """(slots,) of one client.

        Raises:
            ClientError: a value that is not finite, or beyond the bound.
        """
        pieces = [np.ones(1)]
        for entry in self.entries:
            value = _value(update.parts[entry.part], entry).double()
            where = f"{entry.part}/{entry.leaf}"
            if value.numel() and not bool(torch.isfinite(value.sum())):
                raise ClientError(f"{where} has values that are not finite")
            pieces.append(_slots(value, entry, update.parts[entry.part], scale, where))
        return np.concatenate(pieces)

    def update(self, total: np.ndarray, scale: Scale) -> Update:
        """The sums, in the types that clients have.

        Raises:
            WireError: the total is no sum of this many clients.
        """
        clients = round(float(total[0]))
        if not (abs(float(total[0]) - clients) < 0.01 and 1 <= clients <= max(1, scale.clients)):
            raise WireError(f"a total of {float(total[0]):.3f} clients, of {scale.clients} that were asked")
        parts, grids, at = dict[str, Part](), dict[str, float](), 1
        for entry in self.entries:
            count = entry.size * scale.digits(entry.kind, entry.dtype)
            found = _number(total[at : at + count], entry, scale, grids.get(entry.part, 1.0))
            at += count
            known = parts.get(entry.part, Part({}, 0.0))
            if entry.leaf:
                leaf = found.reshape(entry.shape).to(TYPES[entry.dtype])
                parts[entry.part] = replace(known, tree={**known.tree, entry.leaf: leaf})
            elif entry.dtype == "weight":
                parts[entry.part] = replace(known, weight=float(found))
            else:
                grids[entry.part] = 2.0 ** (float(found) / clients)
        return Update(parts)


def _entries(update: Update) -> Iterator[Entry]:
    for name, part in sorted(update.parts.items()):
        if name == CLEAR:
            continue
        if part.weight:
            yield Entry(name, "", "weight", (), "figure")
        if part.grid:
            yield Entry(name, "", "grid", (), "figure")
        for leaf, value in sorted(part.tree.items()):
            kind = "figure" if name in FIGURES else "exact" if part.exact or not value.is_floating_point() else "plain"
            kind = "grid" if part.grid and kind == "plain" else kind
            yield Entry(name, leaf, str(value.dtype).removeprefix("torch."), tuple(value.shape), kind)


def _value(part: Part, entry: Entry) -> Tensor:
    if entry.leaf:
        return part.tree[entry.leaf]
    return torch.tensor(part.weight if entry.dtype == "weight" else math.log2(part.grid), dtype=torch.float64)


def _slots(value: Tensor, entry: Entry, part: Part, scale: Scale, where: str) -> np.ndarray:
    """(size x digits,) of one tensor, digit by digit."""
    if entry.kind == "plain":
        if value.numel() and float(value.abs().max()) > scale.bound:
            raise ClientError(
                f"{where} has an entry of {float(value.abs().max()):.3g}, above homomorphic_sum.bound {scale.bound:g}; "
                "raise the bound, or lower the learning rate"
            )
        plain: np.ndarray = (torch.round(value / scale.grid) * 2.0**-FINE_BITS).reshape(-1).numpy()
        return plain
    whole = torch.round(value / part.grid) if entry.kind == "grid" else torch.round(value * 2.0 ** FRACTION[entry.kind])
    count = scale.digits(entry.kind, entry.dtype)
    if whole.numel() and float(whole.abs().max()) > 2.0 ** min(scale.base * count - 1, ring.WIDTH) / scale.clients:
        raise ClientError(f"{where} is beyond what a sum of {scale.clients} clients can hold")
    digits: np.ndarray = ring.to_digits(whole.to(torch.int64), scale.base, count).reshape(-1).double().numpy()
    return digits


def _number(slots: np.ndarray, entry: Entry, scale: Scale, grid: float) -> Tensor:
    """The numbers of one tensor."""
    if entry.kind == "plain":
        return torch.from_numpy(np.rint(slots * 2.0**FINE_BITS) * scale.grid)
    whole = torch.from_numpy(np.rint(slots).astype(np.int64)).reshape(-1, *entry.shape)
    found = ring.from_digits(whole, scale.base).double()
    return found * (grid if entry.kind == "grid" else 2.0 ** -FRACTION[entry.kind])


def _entry(part: str, leaf: str, dtype: str, shape: Sequence[int], kind: str) -> Entry:
    grids = {name for name, type in TYPES.items() if type in ring.GRID_BITS}
    require_entry((part, leaf, dtype, shape), (grids if kind == "grid" else TYPES) if leaf else NOTES)
    if kind not in KINDS:
        raise ValueError(f"an entry of the kind {kind!r}"[:200])
    return Entry(part, leaf, dtype, tuple(shape), kind)
