"""Weighted means as sums: a client multiplies by its weight, the server divides by the sum of the weights.

sum_k w_k x_k / sum_k w_k        so that a sum, plain or secure, is all that has to be computed
"""

from __future__ import annotations

from dataclasses import replace

from fedllm.messages.update import Part, Update
from fedllm.tensors import tree


def weigh(update: Update, weight: float) -> Update:
    """Client: each part times `weight`, or times its own weight; a part of weight 0 is a sum and stays as it is."""
    return replace(update, parts={name: _weighed(part, weight) for name, part in update.parts.items()})


def divide(total: Update) -> Update:
    """Server: each part over the sum of its weights, which it keeps; a part of weight 0 stays as it is."""
    return replace(total, parts={name: _divided(part) for name, part in total.parts.items()})


def _weighed(part: Part, weight: float) -> Part:
    if part.weight == 0:
        return part
    own = float(weight) if part.weight is None else part.weight
    return replace(part, tree=tree.scale(part.tree, own), weight=own)


def _divided(part: Part) -> Part:
    weight = part.weight
    if not weight:
        return part
    return replace(part, tree=tree.divide(part.tree, weight))
