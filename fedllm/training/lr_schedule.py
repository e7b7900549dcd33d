"""Learning-rate schedules within a round or across the whole run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fedllm.errors import require


@dataclass(frozen=True)
class LrSchedule:
    """A factor on the learning rate: linear warm-up over `warmup` steps, then `shape` down to `floor`.

    `over: round` starts anew in each round; `over: run` spans rounds x steps.
    """

    shape: Literal["constant", "linear", "cosine"] = "constant"
    warmup: int = 0
    over: Literal["round", "run"] = "round"
    floor: float = 0.0

    def __post_init__(self) -> None:
        require(self.warmup >= 0, self, field="warmup", value=self.warmup, allowed="0 or more")
        require(0 <= self.floor <= 1, self, field="floor", value=self.floor, allowed="in [0, 1]")

    def factor(self, *, step: int, steps: int, round: int, rounds: int) -> float:
        """The factor at local step `step` of `steps` in round `round` of `rounds`."""
        if self.over == "run":
            step, steps = round * steps + step, rounds * steps
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, steps - self.warmup)
        match self.shape:
            case "constant":
                return 1.0
            case "linear":
                return self.floor + (1 - self.floor) * (1 - progress)
            case "cosine":
                return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * progress)) / 2
