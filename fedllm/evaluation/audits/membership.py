"""Membership inference from a model alone: was this record trained on?

    loss        -mean_t nll_t                                 Yeom et al. 2018, arXiv 1709.01604
    min_k       -mean of the k largest nll_t, k = 20 %        Shi et al. 2024, arXiv 2310.16789
    zlib        -sum_t nll_t / bytes of the text, packed      Carlini et al. 2021, arXiv 2012.07805
    calibrated  mean_t nll_t of the base model - mean_t nll_t of the tuned one
    blind       the words of the text alone, no model at all

A score is larger for members. `blind` is no attack: it asks whether members and others can be told apart without the
model (Das et al. 2024, arXiv 2406.16201). Where it can, the others are no fair comparison, and no figure says anything.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from itertools import chain

import numpy as np
from torch import Tensor

from fedllm.evaluation.audits.intervals import Floats

SHARE = 0.2  # of the tokens, for min_k
FOLDS = 5


def model_scores(tuned: Sequence[Tensor], base: Sequence[Tensor], texts: Sequence[str]) -> dict[str, Floats]:
    """The scores of some records, by attack.

    Args:
        tuned, base: of each record the negative log-likelihoods of its target tokens. texts: the records.
    """
    mean = np.array([float(one.double().mean()) for one in tuned])
    before = np.array([float(one.double().mean()) for one in base])
    total = np.array([float(one.double().sum()) for one in tuned])
    packed = np.array([len(zlib.compress(text.encode())) for text in texts], dtype=np.float64)
    return {
        "loss": -mean,
        "min_k": -np.array([_largest(one) for one in tuned]),
        "zlib": -total / packed,
        "calibrated": before - mean,
    }


def _largest(values: Tensor) -> float:
    count = max(1, round(SHARE * len(values)))
    return float(values.double().topk(count).values.mean())


def blind_scores(members: Sequence[str], others: Sequence[str]) -> tuple[Floats, Floats]:
    """Naive Bayes on the words, each text scored by the texts of other folds: sum over its words of
    log (1 + members with it) / (2 + members) - the same of others."""
    words = [[sorted(set(text.lower().split())) for text in side] for side in (members, others)]
    found = [np.zeros(len(members)), np.zeros(len(others))]
    for fold in range(FOLDS):
        kept = [[text for place, text in enumerate(side) if place % FOLDS != fold] for side in words]
        counts = [Counter(chain.from_iterable(side)) for side in kept]
        for scores, side in zip(found, words, strict=True):
            for place in range(fold, len(side), FOLDS):
                shares = [[(1 + count[word]) / (2 + len(k)) for word in side[place]]
                          for count, k in zip(counts, kept, strict=True)]  # fmt: skip
                scores[place] = float(np.log(shares[0]).sum() - np.log(shares[1]).sum())
    return found[0], found[1]
