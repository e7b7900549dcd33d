"""The base delta: what the server has added to a model's frozen weights, by version.

    W_v = W_0 + s sum_{u <= v} B_u A_u        s: the scale of the adapter; version v: what holds after v rounds
    sum_{u <= v} B_u A_u = [B_1 .. B_v] [A_1; ..; A_v]

What a round adds, a step, is kept and sent as its factors, which side by side are those of the sum. As soon as they
hold as many values as the layer itself, rank x (in + out) >= in x out, the oldest are added up into one dense leaf, so
that a base delta never takes more than twice the layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedllm.tensors import low_rank, sparse_mask, tree
from fedllm.tensors.tree import Tree

Steps = dict[int, Tree]


@dataclass(frozen=True, eq=False)
class BaseDelta:
    """What is added to the frozen weights behind version `after`.

    `steps[v]` holds leaves of version v, in float32 or wider: `LAYER.lora_B` (out, R) and `LAYER.lora_A` (R, in), whose
    product is added, and with them `LAYER.lora_sparse` (n,), values that are added at the layer's positions
    (`sparse_mask`); or     `LAYER.lora_BA` (out, in), the whole sum up to v, in place of all before it.
    """

    steps: Mapping[int, Tree] = field(default_factory=dict)
    after: int = 0

    @property
    def version(self) -> int:
        """The newest."""
        return max(self.steps, default=self.after)

    def stepped(self, version: int, added: Mapping[str, Tensor]) -> BaseDelta:
        """With factors that a new version adds."""
        assert version > self.version, (version, self.version)
        return BaseDelta(_thinned({**self.steps, version: dict(added)}), self.after)

    def since(self, version: int) -> BaseDelta:
        """What somebody lacks who has this version: factors, or the whole sum of a layer whose factors are gone."""
        found: Steps = {}
        for layer in _layers(self.steps):
            gone = any(_whole(layer) in leaves and at > version for at, leaves in self.steps.items())
            if gone:
                found.setdefault(self.version, {})[_whole(layer)] = self.dense(layer)
                continue
            for at, leaves in self.steps.items():
                if at > version and f"{layer}.{low_rank.A}" in leaves:
                    found.setdefault(at, {}).update({n: leaves[n] for n in _parts(layer) if n in leaves})
        return BaseDelta(dict(sorted(found.items())), version)

    def joined(self, later: BaseDelta) -> BaseDelta:
        """With what `later` adds, as far as it is new: later.after <= version."""
        assert later.after <= self.version, (later.after, self.version)
        found = {at: dict(leaves) for at, leaves in self.steps.items()}
        for at, leaves in later.steps.items():
            for name, leaf in leaves.items() if at > self.version else ():
                if name.endswith(f".{low_rank.PRODUCT}"):
                    _forget(found, name.removesuffix(f".{low_rank.PRODUCT}"))
                found.setdefault(at, {})[name] = leaf
        return BaseDelta(_thinned({at: leaves for at, leaves in sorted(found.items()) if leaves}), self.after)

    def joined_trees(self) -> Tree:
        """All leaves as one tree: `steps3/LEAF` of version 3."""
        return tree.add_prefix(**{f"steps{at}": leaves for at, leaves in self.steps.items()})

    @staticmethod
    def of(joined: Mapping[str, Tensor], versions: Sequence[int], after: int = 0) -> BaseDelta:
        """From what `joined_trees` made."""
        return BaseDelta({at: tree.select_prefix(joined, f"steps{at}") for at in versions}, after)

    @property
    def num_bytes(self) -> int:
        """Of all its leaves."""
        return sum(map(tree.num_bytes, self.steps.values()))

    def layers(self) -> list[str]:
        """The layers that it moves."""
        return _layers(self.steps)

    def dense(self, layer: str) -> Tensor:
        """(out, in): the whole sum of a layer, without the adapter's scale."""
        return _dense(self.steps, layer)

    def folded(self, params: Mapping[str, Tensor]) -> Tree:
        """An adapter's leaves with the base delta among their components: a layer's product is B A + base delta.

        A sum that is dense becomes factors of rank min(out, in), one of them the identity.
        """
        found = dict(params)
        for layer in self.layers():
            pairs = [low_rank.pair(found, layer), *_pairs(self.steps, layer)]
            b, a = torch.cat([b.to(pairs[0][0]) for b, _ in pairs], 1), torch.cat([a.to(pairs[0][1]) for _, a in pairs])
            found |= low_rank.layer_leaves(layer, b, a)
        return found


def _pairs(steps: Mapping[int, Tree], layer: str) -> Iterator[low_rank.Pair]:
    for at in sorted(steps):
        leaves = steps[at]
        if (whole := leaves.get(_whole(layer))) is not None:
            yield _as_factors(whole)
        elif f"{layer}.{low_rank.A}" in leaves:
            yield low_rank.pair(leaves, layer)
            if f"{layer}.{low_rank.SPARSE}" in leaves:
                yield _as_factors(_spread(leaves, layer))


def _as_factors(whole: Tensor) -> low_rank.Pair:
    """Factors of rank min(out, in), one of them the identity."""
    eye = torch.eye(min(whole.shape)).to(whole)
    return (eye, whole) if len(eye) == len(whole) else (whole, eye)


def _spread(leaves: Tree, layer: str) -> Tensor:
    b, a = low_rank.pair(leaves, layer)
    return sparse_mask.scatter(layer, leaves[f"{layer}.{low_rank.SPARSE}"], (len(b), a.shape[1]))


def _parts(layer: str) -> list[str]:
    return [f"{layer}.{end}" for end in (low_rank.A, low_rank.B, low_rank.SPARSE)]


def _dense(steps: Mapping[int, Tree], layer: str) -> Tensor:
    total: Tensor | None = None
    for at in sorted(steps):
        leaves = steps[at]
        added = leaves.get(_whole(layer))
        if added is None and f"{layer}.{low_rank.A}" in leaves:
            added = torch.matmul(*low_rank.pair(leaves, layer))
            added = added + _spread(leaves, layer) if f"{layer}.{low_rank.SPARSE}" in leaves else added
        if added is not None:
            total = added if total is None else total + added
    assert total is not None, layer
    return total


def _thinned(steps: Mapping[int, Tree]) -> Steps:
    """The same sums; of a layer whose factors hold as many values as itself, the oldest are added up."""
    found = {at: dict(leaves) for at, leaves in steps.items()}
    for layer in _layers(steps):
        held = 0
        for at in sorted(steps, reverse=True):
            if f"{layer}.{low_rank.A}" not in steps[at]:
                continue
            b, a = low_rank.pair(steps[at], layer)
            held += sum(steps[at][name].numel() for name in _parts(layer) if name in steps[at])
            if held >= len(b) * a.shape[1]:
                whole = _dense({old: leaves for old, leaves in steps.items() if old <= at}, layer)
                _forget(found, layer, at)
                found[at][_whole(layer)] = whole
                break
    return {at: leaves for at, leaves in found.items() if leaves}


def _forget(steps: Steps, layer: str, newest: int | None = None) -> None:
    for at in steps if newest is None else [at for at in steps if at <= newest]:
        for name in (*_parts(layer), _whole(layer)):
            steps[at].pop(name, None)


def _layers(steps: Mapping[int, Tree]) -> list[str]:
    ends = (f".{low_rank.B}", f".{low_rank.PRODUCT}")
    return sorted({name.rpartition(".")[0] for leaves in steps.values() for name in leaves if name.endswith(ends)})


def _whole(layer: str) -> str:
    return f"{layer}.{low_rank.PRODUCT}"
