"""The best round: which of a run's evaluations counts as the best."""

from __future__ import annotations

import math

from fedllm.evaluation.scores import LOWER_IS_BETTER
from fedllm.evaluation.settings import Evaluation
from fedllm.events import Evaluated

Best = tuple[int, float]  # completed rounds, and the figure


def best_of(best: Best | None, scored: Evaluated, settings: Evaluation) -> Best | None:
    """The better of two evaluations by `evaluation.best`, or by the first metric; the earlier of two that are alike."""
    metric = settings.best or settings.metrics[0]
    value, sign = scored.metrics.get(metric), -1 if metric in LOWER_IS_BETTER else 1
    if value is None or math.isnan(value) or (best is not None and sign * value <= sign * best[1]):
        return best
    return scored.round, value
