"""Send each value in 8, 4 or 1 bits, rounded at random so that the mean stays right.

    8, 4 bits   scale = max|x| of a block / L        code = floor(x / scale) or the next, up with probability the rest
    1 bit       scale = max|x| of a block            code = +1 with probability (1 + x / scale) / 2, else -1

E[code * scale] = x. Alistarh et al. 2017 (QSGD), arXiv 1610.02132; Reisizadeh et al. 2020 (FedPAQ), arXiv 1909.13014.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedllm.errors import require
from fedllm.messages.context import ClientContext, RoundContext
from fedllm.messages.traits import DELTA, NONE, Bracket, Fact, Traits
from fedllm.messages.update import FIGURES, Part, Update
from fedllm.stages.base import Stage
from fedllm.tensors.tree import Tree
from fedllm.tensors.wire_format import (
    SPARSE,
    WireFormat,
    quantization_blocks,
    read_window,
    rounded,
    truncated,
    values,
    write_window,
)


@dataclass(frozen=True)
class Quantize(Stage):
    """Rounds every floating leaf of every part but the figures and marks; leaves of fewer than 32 bits become float32.

    Declared rounding: an entry moves by at most one grid step, which is scale for 8 and 4 bits and 2 scale for 1 bit.
    Of a leaf with a window the values inside are rounded, and nothing else is sent. A sparse part stays sparse at any
    width: its zeros stay zeros, its entries go to the grid, and the wire writes them in full, so that nothing is saved
    beyond the sparsity. A part whose norm a private stage bounds is rounded towards zero, to scales that are powers of
    two: no value grows, and sums stay exact. No setting is neutral to the bit (`block: 1` is in the last digits): leave
    the stage out.

    Args:
        bits: 8, 4 or 1 for each value; and one scale for each block.
        block: values of a leaf that share a scale.
    """

    bits: int
    block: int = 128

    def __post_init__(self) -> None:
        require(self.bits in (8, 4, 1), self, field="bits", value=self.bits, allowed="8, 4 or 1")
        require(self.block >= 1, self, field="block", value=self.block, allowed="at least 1")

    @property
    def traits(self) -> Traits:
        """A bound is kept where values can be rounded towards zero, which one bit cannot."""
        return Traits(Bracket.WIRE, takes=DELTA, keeps=Fact.BOUNDED if self.bits > 1 else NONE)

    def encode(self, update: Update, scratch: Tree, memory: Tree, local: ClientContext) -> tuple[Update, Tree]:
        """Put the values on the grid that their packing names."""
        parts = {
            name: part if part.exact or name in FIGURES else self._rounded(name, part, local.ctx)
            for name, part in update.parts.items()
        }
        return Update(parts), memory

    def _rounded(self, part_name: str, part: Part, ctx: RoundContext) -> Part:
        leaves, scales, windows = dict(part.tree), {}, part.wire_format.windows
        for name, leaf in part.tree.items():
            if leaf.is_floating_point():
                # One generator a leaf: the draws do not depend on the order of a tree.
                generator = ctx.rng(f"quantize/{part_name}/{name}")
                window = windows.get(name)
                box = read_window(leaf if leaf.dtype == torch.float64 else leaf.float(), window)
                rows = quantization_blocks(box, self.block)
                codes, scales[name] = (
                    truncated(rows, self.bits, part.grid) if part.grid else self._codes(rows, generator)
                )
                codes = codes * (rows != 0) if part.wire_format.sparse else codes
                leaves[name] = write_window(values(codes, scales[name], box.shape), window, leaf.shape)
        boxes = {name: window for name, window in windows.items() if name in scales}
        form = WireFormat(bits=self.bits, block=self.block, scales=scales, windows=boxes)
        form = SPARSE if part.wire_format.sparse else form
        return replace(part, tree=leaves, wire_format=form)

    def _codes(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Codes (rows, block) in -L..L and scales (rows,) of values (rows, block)."""
        return rounded(rows, self.bits, generator)
