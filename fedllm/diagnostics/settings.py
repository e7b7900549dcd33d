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
        layers: whose products are looked at, spread evenly; None: all.
        rounds: how long something must last before it is an alarm.
        agreement: clients diverge below this; 1 is that of updates at right angles, 0 that of updates that cancel.
        bias: the aggregation loses too much above this relative aggregation bias.
        bytes_per_loss: a round's bytes outweigh its gain above this many bytes for 1 nat of training loss.
    """

    clients: int = 32
    layers: int | None = 32
    rounds: int = 3
    agreement: float = 0.7
    bias: float = 0.25
    bytes_per_loss: float = 1e10

    def __post_init__(self) -> None:
        allowed = {
            "clients": (self.clients >= 1, "1 or more; evaluation.diagnostics: null watches nobody"),
            "layers": (self.layers is None or self.layers >= 1, "1 or more, or null for all"),
            "rounds": (self.rounds >= 1, "1 or more"),
            "agreement": (0 <= self.agreement < math.inf, "0 or more and finite"),
            "bias": (0 <= self.bias < math.inf, "0 or more and finite"),
            "bytes_per_loss": (0 < self.bytes_per_loss < math.inf, "above 0 and finite"),
        }
        for name, (good, words) in allowed.items():
            if not good:
                raise ConfigError(f"evaluation.diagnostics.{name} is {self.__dict__[name]}; it must be {words}")
