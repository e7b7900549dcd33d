"""Fixed point: what a client sends becomes integers, small enough that the sum over a cohort cannot wrap.

    s = floor((2^(m-1) - 1) / (n W)) / c        q = floor(s w x + u), u uniform in [0, 1)        sum_k q_k / s

m: bits of the ring. n: clients of the cohort. W: the largest weight. c: bound on an entry. E[q / s] = w x, and
|s w x| <= (2^(m-1) - 1) / n. Bonawitz et al. 2019, arXiv 1912.00131, section 3; with `rotate`, x is first turned by a
random Hadamard rotation that all clients share, after which no entry is much larger than ||x|| / sqrt(d).

Weights, metrics, counts and parts that are exact become digits of b bits, clients (2^b - 1) <= 2^(m-1) - 1, so that
nothing of a client travels in the clear. A part on the grid of a bounded norm is sent as its integers, exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fedllm.errors import ClientError, ConfigError, RoundVoid, require
from fedllm.messages.context import ClientContext, RoundContext
from fedllm.messages.traits import DELTA, Bracket, Fact, Traits
from fedllm.messages.update import FIGURES, Part, Update
from fedllm.stages.base import Stage
from fedllm.tensors import ring
from fedllm.tensors.tree import Tree

FIGURE, EXACT = 24, 40  # fraction bits of figures about the work, and of tensors that no stage may round
TYPES = {16: torch.int16, 20: torch.int32, 32: torch.int32}
VALUES, GRID, DIGITS = "values", "grid", "digits"  # the parts of what is sent
PADDING = "padding//"


@dataclass(frozen=True)
class FixedPoint(Stage):
    """Integers for a sum that nobody may look into. Declared rounding: an entry of w x moves by less than 1 / s.

    Entries of w x beyond W c are cut to it. Needs a weigher before it, and nothing behind it may touch the integers.
    What is sent is dense: zeros of a sparse part, and all that lies outside of a window, are sent too. No setting is
    neutral: rounding is what it does, so leave the stage out.

    Args:
        ring: bits of the integers; 16 travels as 2 bytes a value, 32 as 4, 20 as 4 where the aggregator does not pack.
        bound: c, in the units of the update (with `rotate`: of the rotated one).
        max_weight: W. With by_examples at least the examples of the largest client; with uniform 1.
        rotate: turn the values first, so that a small bound cuts little off; fills up to a power of two.
    """

    ring: Literal[16, 20, 32] = 32
    bound: float = 1.0
    max_weight: float = 1.0
    rotate: bool = False

    traits = Traits(Bracket.WIRE, takes=DELTA, gives=Fact.INTEGERS, keeps=Fact.BOUNDED)

    def __post_init__(self) -> None:
        require(self.ring in TYPES, self, field="ring", value=self.ring, allowed="16, 20 or 32")
        for name in ("bound", "max_weight"):
            value = self.__dict__[name]
            require(0 < value < math.inf, self, field=name, value=value, allowed="above 0 and finite")

    def levels(self, clients: int) -> int:
        """floor((2^(m-1) - 1) / (n W)): steps from 0 to c that each of `clients` has.

        Raises:
            ConfigError: there is none, so that a sum could wrap.
        """
        found = int(ring.largest(self.ring) / (max(1, clients) * self.max_weight))
        if found < 1:
            raise ConfigError(
                f"fixed_point.ring {self.ring} has no room for the sum of {clients} clients of weight "
                f"{self.max_weight:g}: (2^{self.ring - 1} - 1) / ({clients} x {self.max_weight:g}) is below 1; use a "
                "wider ring, a smaller max_weight or smaller cohorts"
            )
        return found

    def digit_bits(self, clients: int) -> int:
        """Bits of a digit that so many clients may add up.

        Raises:
            ConfigError: there is none.
        """
        found = ring.digit_bits(self.ring, clients)
        if found < 1:
            raise ConfigError(f"fixed_point.ring {self.ring} is too small for {clients} clients; use a wider ring")
        return found

    def encode(self, update: Update, scratch: Tree, memory: Tree, local: ClientContext) -> tuple[Update, Tree]:
        """To integers.

        Raises:
            ClientError: a weight above the cap, a value that is not finite, or a figure out of range.
        """
        plain, grid, digits = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()
        digits["clients/float64/"] = self._digits(torch.ones(()), FIGURE, local.ctx, "clients")
        for name, part in update.parts.items():
            if part.weight:
                self._weighs(name, part.weight)
                weight = torch.tensor(part.weight, dtype=torch.float64)
                digits[f"weight/float64/{name}"] = self._digits(weight, FIGURE, local.ctx, "weight")
            if part.grid:
                exponent = torch.tensor(math.log2(part.grid), dtype=torch.float64)
                digits[f"grid/float64/{name}"] = self._digits(exponent, FIGURE, local.ctx, "grid")
            for leaf, value in part.tree.items():
                key = f"{name}/{str(value.dtype).removeprefix('torch.')}/{leaf}"
                if name in FIGURES or part.exact or not value.is_floating_point():
                    digits[key] = self._digits(value, FIGURE if name in FIGURES else EXACT, local.ctx, key)
                elif part.grid:
                    grid[key] = self._on_grid(value, part, local.ctx, key)
                else:
                    plain[key] = value.double()
        sent = {VALUES: self._rounded(plain, local.ctx), GRID: grid, DIGITS: digits}
        return Update({name: Part(leaves, 0.0) for name, leaves in sent.items() if leaves}), memory

    def _weighs(self, name: str, weight: float) -> None:
        if name not in FIGURES and weight > self.max_weight:
            raise ClientError(
                f"its part '{name}' weighs {weight:g}, above fixed_point.max_weight {self.max_weight:g}; raise "
                "max_weight, or use uniform"
            )

    def _rounded(self, plain: Tree, ctx: RoundContext) -> Tree:
        """Each entry s w x to an integer below or above, within (2^(m-1) - 1) / n."""
        for key, value in plain.items():
            _finite(value, key)
        levels = self.levels(ctx.cohort) if plain else 1
        most, generator = int(levels * self.max_weight), ctx.rng("fixed_point")
        found = dict[str, Tensor]()
        for key, value in sorted((self._turned(plain, ctx) if self.rotate else plain).items()):
            scaled = (value * (levels / self.bound)).clamp(-most, most)
            found[key] = ring.stochastic_round(scaled, generator).to(TYPES[self.ring])
        return found

    def _turned(self, leaves: Tree, ctx: RoundContext, *, back: bool = False) -> Tree:
        """The rotated values in the shapes of the leaves, and what fills them up to a power of two."""
        names = sorted(name for name in leaves if name != PADDING)
        if not names:
            return leaves
        flat = torch.cat([leaves[name].reshape(-1) for name in names])
        count = ring.power_above(flat.numel())
        rest = leaves.get(PADDING, flat.new_zeros(count - flat.numel()))
        generator = ctx.key.fold(ctx.round, "fixed_point/rotation").generator()
        turned = ring.rotated(torch.cat([flat, rest]), generator, back=back)
        pieces = torch.split(turned, [*(leaves[name].numel() for name in names), rest.numel()])
        found = {name: piece.reshape(leaves[name].shape) for name, piece in zip(names, pieces, strict=False)}
        return found if back else {**found, PADDING: pieces[-1]}

    def _on_grid(self, value: Tensor, part: Part, ctx: RoundContext, key: str) -> Tensor:
        """(digits, ...): x / grid towards zero, so that no value grows. One digit where the sums have room for it."""
        _finite(value, key)
        room = ring.GRID_BITS[value.dtype] - math.ceil(math.log2(max(1, ctx.population)))
        size = part.bits or room  # |x / grid| <= 2^size
        whole = (value.double() / part.grid).trunc()
        if whole.numel() and float(whole.abs().max()) > 2.0**size:
            raise ClientError(f"{key} is beyond the bound that its grid was made for")
        base = self.digit_bits(ctx.cohort)
        count = 1 if ctx.cohort * 2**size <= ring.largest(self.ring) else -(-(size + 2) // base)
        return ring.to_digits(whole.to(torch.int64), base, count).to(TYPES[self.ring])

    def _digits(self, value: Tensor, fraction: int, ctx: RoundContext, key: str) -> Tensor:
        """(digits, ...): x 2^fraction, rounded to the nearest."""
        _finite(value.double(), key)
        whole, base = torch.round(value.double() * 2.0**fraction), self.digit_bits(ctx.cohort)
        largest = 2.0**ring.WIDTH / max(1, ctx.cohort)
        if whole.numel() and float(whole.abs().max()) > largest:
            raise ClientError(f"{key} is above {largest / 2.0**fraction:.3g}, the largest figure of a sum")
        return ring.to_digits(whole.to(torch.int64), base, -(-(ring.WIDTH + 1) // base)).to(TYPES[self.ring])

    def decode(self, total: Update, params: Tree, state: Tree, ctx: RoundContext) -> tuple[Update, Tree]:
        """From sums of integers to the sums of the parts and of their weights, in the types that clients have.

        Raises:
            RoundVoid: the total is no sum over clients of this cohort.
        """
        if DIGITS not in total.parts:  # nobody answered
            return total, state
        base, digits = self.digit_bits(ctx.cohort), total.parts[DIGITS].tree
        clients = _read(digits["clients/float64/"], base, FIGURE)
        if not (float(clients).is_integer() and 0 <= clients <= ctx.cohort):
            raise RoundVoid(f"what was added up is no sum over the {ctx.cohort} clients of its cohort")
        notes, parts = dict[str, Tensor](), dict[str, Part]()
        for key, value in _restored(self, total, base, ctx):
            part, kind, leaf = key.split("/", 2)
            if part in ("weight", "grid"):
                notes[f"{part}/{leaf}"] = value
                continue
            known = parts.get(part, Part({}, 0.0))
            parts[part] = replace(known, tree={**known.tree, leaf: value.to(getattr(torch, kind))})
        for key, weight in notes.items():
            if key.startswith("weight/") and key[7:] in parts:
                parts[key[7:]] = replace(parts[key[7:]], weight=float(weight))
        return Update(parts), state


def _restored(stage: FixedPoint, total: Update, base: int, ctx: RoundContext) -> Iterator[tuple[str, Tensor]]:
    """The sums by key, in float64."""
    digits = total.parts[DIGITS].tree
    clients = max(1.0, float(_read(digits["clients/float64/"], base, FIGURE)))
    for key, leaf in digits.items():
        figure = key.split("/", 1)[0] in FIGURES | {"weight", "grid", "clients"}
        if not key.startswith("clients/"):
            yield key, _read(leaf, base, FIGURE if figure else EXACT)
    if GRID in total.parts:
        for key, leaf in total.parts[GRID].tree.items():
            exponent = float(_read(digits[f"grid/float64/{key.split('/', 1)[0]}"], base, FIGURE)) / clients
            if not exponent.is_integer():
                raise RoundVoid(f"the clients' grids of {key} differ")
            yield key, ring.from_digits(leaf, base).double() * 2.0**exponent
    if VALUES in total.parts:
        scale = stage.bound / stage.levels(ctx.cohort)
        leaves = {key: leaf.double() * scale for key, leaf in total.parts[VALUES].tree.items()}
        yield from (stage._turned(leaves, ctx, back=True) if stage.rotate else leaves).items()


def _read(leaf: Tensor, base: int, fraction: int) -> Tensor:
    return ring.from_digits(leaf, base).double() * 2.0**-fraction


def _finite(value: Tensor, key: str) -> None:
    if value.numel() and not bool(torch.isfinite(value.sum())):
        raise ClientError(f"{key} has values that are not finite")
