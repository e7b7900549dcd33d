"""DAGER: the text of a batch from one client's update, exactly where the theory holds.

    bag       every token of the vocabulary whose input of the first block lies in the span of that block's update
    decoding  from each token of the bag, one token of the bag after another, while the input of the second block lies
              in the span of its update; a text is what no token continues

Petrov et al. 2024, arXiv:2405.15586, for causal models with rotary positions. The first block's input says nothing of
the place, the second one's depends on all tokens before it. The last token of a text predicts nothing and is in no
update.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedllm.evaluation.audits.spans import LayerSpans
from fedllm.models.loaded_model import LoadedModel

# up to these distances an input of the first and of the second block is one of the batch's
IN_BAG, IN_TEXT = 0.01, 1e-3
MOST, BEAM, LONGEST = 300, 24, 128  # tokens of a bag; prefixes that are followed; tokens of a text
CHUNK = 2048


@dataclass(frozen=True)
class Reconstruction:
    """What was found. bag: tokens, the nearest first; texts: the longest first. reason: why there are none."""

    bag: tuple[int, ...]
    texts: tuple[tuple[int, ...], ...]
    reason: str = ""


def dager(model: LoadedModel, first: LayerSpans, second: LayerSpans) -> Reconstruction:
    """Reconstruct the texts behind the updates of the first two blocks."""
    if first.full:
        return Reconstruction((), (), "the inputs are as many as the update has directions")
    size = int(model.base.model.get_input_embeddings().num_embeddings)
    every = torch.arange(size)
    distances = torch.cat([_distances(model, first, part[:, None]) for part in every.split(CHUNK)])
    order = distances.argsort()
    bag: list[int] = order[distances[order] < IN_BAG].tolist()
    if not bag:
        return Reconstruction((), (), "no token lies in the span")
    if len(bag) > MOST:
        return Reconstruction(tuple(bag[:MOST]), (), f"{len(bag)} tokens lie in the span: too many to put in order")
    if second.full:
        return Reconstruction(tuple(bag), (), "the second block's inputs are as many as its update has directions")
    return Reconstruction(tuple(bag), tuple(_decoded(lambda rows: _distances(model, second, rows), bag)))


def _decoded(distances: Callable[[Tensor], Tensor], bag: Sequence[int]) -> list[tuple[int, ...]]:
    """Prefixes that nothing of the bag continues, the longest first."""
    ended: list[tuple[float, tuple[int, ...]]] = []
    alive: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    for _ in range(LONGEST):
        rows = [(score, (*prefix, token)) for score, prefix in alive for token in bag]
        found = distances(torch.tensor([prefix for _, prefix in rows])).tolist()
        grown = sorted((score + far, prefix) for (score, prefix), far in zip(rows, found, strict=True) if far < IN_TEXT)
        went_on = {prefix[:-1] for _, prefix in grown}
        ended += [(score / max(1, len(prefix)), prefix) for score, prefix in alive if prefix and prefix not in went_on]
        alive = grown[:BEAM]
        if not alive:
            break
    ended += [(score / len(prefix), prefix) for score, prefix in alive]
    return [prefix for _, prefix in sorted(ended, key=lambda one: (-len(one[1]), one[0]))]


def _distances(model: LoadedModel, layer: LayerSpans, rows: Tensor) -> Tensor:
    """(n,): how far the input of the last of (n, L) tokens is from a layer's span."""
    return torch.cat([layer.distance(_input(model, layer.module, part)[:, -1]) for part in rows.split(CHUNK)])


class _Enough(Exception):
    """The layer's input is there; the rest of the pass is not needed."""


@torch.no_grad()
def _input(model: LoadedModel, module: str, tokens: Tensor) -> Tensor:
    """(n, L, d): what a linear layer of the base model is given."""
    seen: list[Tensor] = []

    def stop(_: object, given: tuple[Tensor, ...]) -> None:
        seen.append(given[0])
        raise _Enough

    layer = model.base.model.get_submodule(module)
    handle = layer.register_forward_pre_hook(stop)
    try:
        model.base.model(tokens.to(model.device), use_cache=False)
    except _Enough:
        pass
    finally:
        handle.remove()
    return seen[0].cpu()
