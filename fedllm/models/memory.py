"""What a pass of a model keeps in memory: figures for whoever decides how many clients train at once.

    saved for the gradient   c0 + c1 T + c2 sum L^2 + c3 S     T tokens, L lengths of S sequences
    head                     bytes of one row's logits

The c are measured once, on short rows, with and without recomputation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedllm.models.batch import Example, collate
from fedllm.models.kernels import prepack
from fedllm.models.kernels.ops import supports_product
from fedllm.models.layers.attention import SHORT
from fedllm.models.layers.cross_entropy import pieces
from fedllm.models.loaded_model import LoadedModel
from fedllm.tensors.tree import Tree, stack


@dataclass(frozen=True)
class SavedActivations:
    """Bytes that a pass keeps for its gradient: base + token T + square sum L^2 + sequence S."""

    base: float
    token: float
    square: float
    sequence: float

    def of(self, lengths: Sequence[int], less: int = 0) -> float:
        """Bytes for sequences of these lengths, `less` of whose tokens are not computed."""
        squares = sum(length**2 for length in lengths if length <= SHORT)
        return self.base + self.token * (sum(lengths) - less) + self.square * squares + self.sequence * len(lengths)


@dataclass(frozen=True)
class MemoryTerms:
    """`whole` and `recomputed`: without and with recomputation. `layers`: recomputation holds one of them at a time.
    `head`: bytes of one row's logits in the head's type and in float32. `rows`: how many of each exist at once."""

    whole: SavedActivations
    recomputed: SavedActivations
    layers: int
    head: tuple[int, int]
    rows: tuple[int, int]


def memory_terms(model: LoadedModel, params: Tree) -> MemoryTerms:
    """Measure what a pass with these parameters keeps."""
    head = model.adapter.head(stack([params])).to(model.device)  # a trained head comes with the parameters
    layers = len({name for name, _ in model.base.model.named_modules() if re.fullmatch(r".*layers\.\d+", name)})
    wide = torch.promote_types(head.dtype, torch.float32).itemsize
    return MemoryTerms(
        whole=_fitted(model, params, recompute=False),
        recomputed=_fitted(model, params, recompute=True),
        layers=max(1, layers),
        head=(len(head) * head.element_size(), len(head) * wide),
        rows=pieces(head),
    )


def prepacked_bytes(model: LoadedModel) -> int:
    """Bytes of the frozen weights once more, laid out for the kernels that read them so."""
    linears = [module for module in model.base.model.modules() if type(module) is nn.Linear]
    weights = {id(linear.weight): linear.weight for linear in linears if supports_product(linear.weight)}
    return prepack.num_bytes(weights.values())


PROBES = ((32, 32), (64,), (64, 64), (16, 16, 16, 16))  # lengths of sequences


def _fitted(model: LoadedModel, params: Tree, *, recompute: bool) -> SavedActivations:
    rows = [[1, sum(p), sum(n * n for n in p), len(p)] for p in PROBES]
    found = [_kept(model, params, lengths, recompute) for lengths in PROBES]
    solved = torch.linalg.solve(torch.tensor(rows).double(), torch.tensor(found).double())
    return SavedActivations(*solved.clamp(min=0).tolist())


def _kept(model: LoadedModel, params: Tree, lengths: Sequence[int], recompute: bool) -> int:
    """Bytes of all tensors that one pass keeps, each piece of memory once, the model's and the adapter's not at all."""
    leaves = {name: leaf[None].to(model.device, copy=True).requires_grad_() for name, leaf in params.items()}
    tensors = [*model.base.model.parameters(), *model.base.model.buffers(), *leaves.values(), *model.constants.values()]
    known = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in known:
            kept[memory.data_ptr()] = memory.nbytes()
        return tensor

    batch = collate([[_example(length) for length in lengths]], recompute=recompute)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model.losses(leaves, batch)
    total = sum(kept.values())
    del loss
    return total


def _example(length: int) -> Example:
    targets = torch.full((length,), -100)
    targets[-1] = 1
    return Example(torch.arange(1, length + 1), targets)
