"""What is watched in a run, and from where on it is worth a warning."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedllm.errors import ConfigError


@dataclass(frozen=True)
class Diagnostics:
    """Drift, cosines, aggregation bias and ranks of each round; the run's result does not depend on them.

    Args:
        clients: whose updates are kept until the round's end, the first of each cohort; fewer if they do not fit
            256 MiB.
        rounds: how long something must last before it is an alarm.
        cosine: clients diverge below this mean cosine of their updates.
        bias: the aggregation loses too much above this relative aggregation bias.
        bytes_per_loss: a round's bytes outweigh its gain above this many bytes for 1 nat of training loss.
    """

    clients: int = 32
    rounds: int = 3
    cosine: float = 0.0
    bias: float = 0.5
    bytes_per_loss: float = 1e10

    def __post_init__(self) -> None:
        allowed = {
            "clients": (self.clients >= 1, "1 or more; evaluation.diagnostics: null watches nobody"),
            "rounds": (self.rounds >= 1, "1 or more"),
            "cosine": (-1 <= self.cosine <= 1, "in [-1, 1]"),
            "bias": (0 <= self.bias < math.inf, "0 or more and finite"),
            "bytes_per_loss": (0 < self.bytes_per_loss < math.inf, "above 0 and finite"),
        }
        for name, (good, words) in allowed.items():
            if not good:
                raise ConfigError(f"evaluation.diagnostics.{name} is {self.__dict__[name]}; it must be {words}")
