"""A client sends the components of its adapter that moved most, as many as its bandwidth carries: HAFLQ.

    s_j = ||b_j' a_j' - b_j a_j||_F        component j (a column of B, a row of A) before and after the local training

The highest precision at which all components fit is taken. If they fit at none, it is the lowest, and components go in
the order of s_j, over all layers together, as far as they fit: more components go before higher precision. What is not
sent stays as the server has it, if the mean is over the contributors (`lora_pad`).

Su et al. 2024 (HAFLQ), arXiv 2411.06581: components by importance, in a precision that suits the bandwidth. s_j stands
for its smoothed sensitivity. Who counts for a component is up to the stage that makes the part "holders".
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedllm.errors import ClientError, require
from fedllm.messages.context import ClientContext, RoundContext
from fedllm.messages.traits import BOTH_FACTORS, Bracket, Fact, Traits
from fedllm.messages.update import Part, Update
from fedllm.stages.base import Stage
from fedllm.tensors import low_rank, wire_format
from fedllm.tensors.tree import Tree
from fedllm.tensors.wire_format import DENSE, IndexSelection, Window, WireFormat, read_window, write_window

FULL = 32  # bits that mean: as the values are

Component = tuple[str, int]  # a layer, and the place of a row of A and a column of B
Places = dict[str, list[int]]  # of each layer, the places of its components


@dataclass(frozen=True)
class LoraCap(Stage):
    """Fits the values of an update, all parts together, to the bytes of its client's `profile.bandwidth`.

    Declared rounding: as `quantize`, of the same bits and block; none at 32 bits. No setting is neutral; clients
    without a bandwidth, or with one that holds everything, are, to the bit.

    Args:
        bits: the precisions that may be chosen, of 32 (as they are), 8, 4 and 1 for each value.
        block: values that share a scale, below 32 bits.
    """

    bits: tuple[int, ...] = (FULL, 8, 4)
    block: int = 128

    traits = Traits(
        Bracket.WIRE,
        takes=frozenset({"delta", "holders"}),
        needs=BOTH_FACTORS,
        gives=Fact.FITTED,
        keeps=Fact.BOUNDED | Fact.SUM_OF_DELTAS | Fact.FIXED_SIZES,
        loses=Fact.FITTED,  # what another stage has fitted
    )

    def __post_init__(self) -> None:
        known = bool(self.bits) and set(self.bits) <= {FULL, 8, 4, 1}
        require(known, self, field="bits", value=list(self.bits), allowed="one or more of 32, 8, 4 and 1")
        require(self.block >= 1, self, field="block", value=self.block, allowed="at least 1")

    def receive(self, params: Tree, extra: Tree, memory: Tree, local: ClientContext) -> tuple[Tree, Tree]:
        """Remember where the client starts."""
        return params, params

    def encode(self, update: Update, scratch: Tree, memory: Tree, local: ClientContext) -> tuple[Update, Tree]:
        """Leave out what does not fit, of the delta and of the marks of who holds what.

        Raises:
            ClientError: not one component fits; says what would do.
        """
        part, cap = update.parts.get("delta"), local.ctx.profile.bandwidth
        if part is None or cap is None:
            return update, memory
        holders = update.parts["holders"]
        fixed = wire_format.num_bytes({n: leaf for n, leaf in part.tree.items() if not low_rank.is_factor(n)}, DENSE)
        fixed += sum(
            wire_format.num_bytes(other.tree, other.wire_format) for other in update.without("delta").parts.values()
        )
        order = _order(part, holders.tree, scratch)
        bits, places = self._chosen(part.tree, order, cap - fixed)
        if order and not places:
            least = fixed + min(self._bytes(part.tree, layer, 1, bits) for layer, _ in order)
            raise ClientError(
                f"its bandwidth of {cap} bytes a round is below the {least} that one component of the adapter takes "
                f"with what goes along; set it to {least} or more"
            )
        marks = {name: _marked(leaf, places.get(_layer(name), [])) for name, leaf in holders.tree.items()}
        update = update.having("holders", replace(holders, tree=marks))
        return update.having("delta", self._cut(part, places, bits, local.ctx)), memory

    def _chosen(self, leaves: Tree, order: Sequence[Component], room: int) -> tuple[int, Places]:
        """The precision, and the components that are sent in it."""
        for bits in sorted(self.bits, reverse=True):
            places: Places = defaultdict(list)
            left = room
            for layer, j in order:
                count = len(places.get(layer, ()))
                more = self._bytes(leaves, layer, count + 1, bits) - self._bytes(leaves, layer, count, bits)
                if more <= left:
                    places[layer].append(j)
                    left -= more
            if sum(map(len, places.values())) == len(order):
                break
        return bits, {layer: sorted(found) for layer, found in places.items()}

    def _bytes(self, leaves: Tree, layer: str, count: int, bits: int) -> int:
        """What some components of a layer take."""
        b, a = low_rank.pair(leaves, layer)
        sizes = (count * len(b), count * a.shape[1])
        if bits == FULL:
            return sum(sizes) * a.element_size()
        return sum(wire_format.few_bits_bytes(size, bits, self.block, a.element_size()) for size in sizes)

    def _cut(self, part: Part, places: Places, bits: int, ctx: RoundContext) -> Part:
        """The components at these places, on a grid of so many bits."""
        leaves, scales, windows = dict(part.tree), Tree(), dict[str, Window]()
        for name in filter(low_rank.is_factor, part.tree):
            windows[name] = IndexSelection(low_rank.component_axis(name), tuple(places.get(_layer(name), ())))
            held = read_window(leaves[name], windows[name])
            if bits != FULL:
                rows, generator = wire_format.quantization_blocks(held, self.block), ctx.rng(f"lora_cap/{name}")
                codes, scales[name] = wire_format.rounded(rows, bits, generator)
                held = wire_format.values(codes, scales[name], held.shape)
            leaves[name] = write_window(held, windows[name], leaves[name].shape)
        form = WireFormat(bits=None if bits == FULL else bits, block=self.block, scales=scales, windows=windows)
        return replace(part, tree=leaves, wire_format=form)


def _order(part: Part, holders: Tree, start: Tree) -> list[Component]:
    """The components that a client holds, the one that moved most first; of equal ones the first by name and place."""
    start, _ = low_rank.padded({name: start[name] for name in part.tree}, part.tree)
    found: list[tuple[float, Component]] = []
    for layer in low_rank.layers(part.tree):
        held = holders[f"{layer}.{low_rank.A}"].nonzero().flatten().tolist()
        moved = _moved(low_rank.pair(start, layer), low_rank.pair(part.tree, layer), part.weight or 1.0).tolist()
        found += [(-moved[j], (layer, j)) for j in held]
    return [component for _, component in sorted(found)]


def _moved(start: low_rank.Pair, delta: low_rank.Pair, weight: float) -> Tensor:
    """(rank,): ||b_j' a_j' - b_j a_j||_F = ||db_j a_j' + b_j da_j||_F, in float64, without a product."""
    b, a, db, da = start[0].double(), start[1].double().T, delta[0].double() / weight, delta[1].double().T / weight
    after = a + da
    square = db.square().sum(0) * after.square().sum(0) + b.square().sum(0) * da.square().sum(0)
    return (square + 2 * (db * b).sum(0) * (after * da).sum(0)).clamp(min=0).sqrt()


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


def _marked(leaf: Tensor, places: Sequence[int]) -> Tensor:
    """A leaf (rank,) with zeros at all other places."""
    marks = torch.zeros_like(leaf)
    marks[places] = leaf[places]
    return marks
