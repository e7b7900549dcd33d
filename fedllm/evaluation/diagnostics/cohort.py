"""One round's updates as the server sees them, and what they say of each other and of the aggregation.

    drift          ||Delta_k||        Delta_k: from what client k was sent to what it came to
    cosine         the mean over pairs k < l of <Delta_k, Delta_l> / (||Delta_k|| ||Delta_l||)
    dissimilarity  sqrt(sum_k p_k ||Delta_k||^2) / ||sum_k p_k Delta_k||

An update is seen after the stages' `encode`, as it is sent: rounded, cut, or with a product in place of its factors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from fedllm.evaluation.diagnostics import geometry
from fedllm.evaluation.diagnostics.products import Seen, bias, layers, spectra
from fedllm.evaluation.settings import Diagnostics
from fedllm.events import Diagnosed
from fedllm.messages.update import Request, Update
from fedllm.stages.lora import stacked_factors
from fedllm.tensors import tree
from fedllm.tensors.tree import Tree

MOST_VALUES = 1 << 26  # of the updates that are kept: 256 MiB
MOST_SHOWN = 16  # clients whose cosines are written one by one


@dataclass(eq=False)
class CohortStatistics:
    """The updates of a round's first clients, and the drift of all.

    Args:
        settings: how many clients and layers. constants: the adapter's frozen tensors, which all clients have.
        scale: of the adapter's products. smallest: rank among all clients, where it is below the adapter's.
        fixed: lost clients count in the mean as no change, so that it is not to be that of those who answered.
    """

    settings: Diagnostics
    constants: Tree
    scale: float
    smallest: int | None
    fixed: bool = False
    asked: int = 0
    seen: list[Seen] = field(default_factory=list)
    drift: dict[str, float] = field(default_factory=dict)

    def __call__(self, request: Request, reply: Update) -> None:
        """Take in one client's sealed update; what is kept is a copy."""
        self.asked = request.ctx.cohort
        part = reply.parts.get("delta")
        if part is None:
            return
        weight, client = part.weight or 1.0, str(request.ctx.client)
        delta = _cut(tree.divide(part.tree, weight), request.params)
        if alone := stacked_factors.factors_of_client(reply, request.params, request.ctx):
            delta = delta | alone
        self.drift[client] = tree.norm(delta)
        if request.ctx.slot < min(self.settings.clients, MOST_VALUES // max(1, tree.num_values(delta))):
            self.seen.append(Seen(client, weight, {**self.constants, **request.params}, delta))

    def diagnosed(self, round: int, params: Tree) -> list[Diagnosed]:
        """The round's figures, none if nobody answered; `params` are those that the server came to."""
        if not self.drift:
            return []
        after = {**self.constants, **params}
        lost = bias(self.seen, after, self.settings.layers)
        rank, energy = spectra(after, layers(after, params, self.settings.layers), self.smallest)
        whole = len(self.seen) == (self.asked if self.fixed else len(self.drift))
        return [
            Diagnosed(
                round=round,
                answered=len(self.drift),
                drift=_rounded(fmean(self.drift.values())),
                clients={one.client: _rounded(self.drift[one.client]) for one in self.seen},
                bias=_short(lost.total) if lost and whole else None,
                bias_of_means=_short(lost.means) if lost else None,
                product_norm=_short(self.scale * lost.norm) if lost else None,
                effective_rank=_short(rank),
                energy_above=_short(energy),
                smallest_rank=self.smallest,
                **_angles(self.seen),
            )
        ]


def _cut(delta: Tree, sent: Tree) -> Tree:
    """Without the zeros that fill an update of a smaller rank up."""
    if tree.forms(delta) == tree.forms(sent):
        return delta
    return {name: _inside(leaf, sent[name].shape) if name in sent else leaf for name, leaf in delta.items()}


def _inside(leaf: Tensor, shape: torch.Size) -> Tensor:
    """The tensor's first values in each axis; a tensor of another form as it is."""
    if leaf.shape == shape:
        return leaf
    fits = leaf.dim() == len(shape) and all(own >= size for own, size in zip(leaf.shape, shape, strict=True))
    return leaf[tuple(map(slice, shape))] if fits else leaf


def _angles(seen: Sequence[Seen]) -> dict[str, Any]:
    if len(seen) < 2:
        return {"cosine": None, "dissimilarity": None}
    names = sorted(set.intersection(*(set(one.delta) for one in seen)))
    gram = geometry.gram([[one.delta[name] for one in seen] for name in names])
    found, share = geometry.cosines(gram), torch.tensor([one.weight for one in seen], dtype=torch.float64)
    share /= share.sum()
    length = math.sqrt(max(0.0, float(share @ gram @ share)))
    return {
        "cosine": _short(fmean(found)),
        "cosines": tuple(float(f"{value:.4f}") for value in found) if len(seen) <= MOST_SHOWN else (),
        "dissimilarity": _short(math.sqrt(float(share @ gram.diagonal())) / length) if length > 0 else None,
    }


def _rounded(value: float) -> float:
    """Six digits."""
    return float(f"{value:.6g}")


def _short(value: float | None) -> float | None:
    """None where there is no finite number, as of clients that have diverged."""
    return None if value is None or not math.isfinite(value) else _rounded(value)
