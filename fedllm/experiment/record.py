"""The experiment: the frozen record of everything that decides a run's result."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fedllm.aggregators.base import Aggregator
from fedllm.aggregators.sum import Sum
from fedllm.data.federation import Federation
from fedllm.errors import ConfigError
from fedllm.evaluation.settings import Evaluation
from fedllm.experiment.schedules import Schedule, Synchronous
from fedllm.models.task import Task
from fedllm.rng import Key
from fedllm.stages.base import Stage
from fedllm.stages.personalization.keep import Keep
from fedllm.stages.privacy.base import PrivateStage
from fedllm.stages.privacy.no_figures import NoFigures
from fedllm.training.base import Work
from fedllm.training.dp_sgd import DpSgd


@dataclass(frozen=True)
class Limits:
    """What ends a run or voids a round, and how often the run is saved.

    Args:
        bytes: serialised bytes up and down, all clients; the run ends after the round that passes it.
        seconds: the run ends after the round that passes it.
        quorum: replies that a round needs; with fewer it counts as an empty round.
        checkpoint_every: rounds; keep_last: how many checkpoints are kept beside the best.
    """

    bytes: int | None = None
    seconds: float | None = None
    quorum: int = 1
    checkpoint_every: int = 1
    keep_last: int = 2

    def __post_init__(self) -> None:
        for name in ("quorum", "checkpoint_every", "keep_last"):
            if self.__dict__[name] < 1:
                raise ConfigError(f"limits.{name} is {self.__dict__[name]}; it must be 1 or more")
        for name in ("bytes", "seconds"):
            value = self.__dict__[name]
            if value is not None and not value > 0:
                raise ConfigError(f"limits.{name} is {value}; it must be above 0, or null for no limit")


@dataclass(frozen=True)
class PrivacyDemand:
    """What a run must keep to; a stage or the work adds the noise.

    Args:
        unit: who is protected: "client", all that one client holds, or "example", one record of a client.
        target_epsilon: the budget. It sets the noise of a stage whose `noise_multiplier` is null, and ends a run before
            the round that would pass it; null: no budget.
        target_delta: null: a tenth of 1 / clients (of 1 / the smallest client's examples), and at most 1e-5.
        seeded_noise: draw the noise from the run's public key, for tests: it hides nothing.
    """

    unit: Literal["client", "example"] = "client"
    target_epsilon: float | None = None
    target_delta: float | None = None
    seeded_noise: bool = False

    def __post_init__(self) -> None:
        epsilon, delta = self.target_epsilon, self.target_delta
        if epsilon is not None and not 0 < epsilon < math.inf:
            raise ConfigError(f"demands.privacy.target_epsilon is {epsilon}; it must be above 0 and finite")
        if delta is not None and not 0 < delta < 1:
            raise ConfigError(f"demands.privacy.target_delta is {delta}; it must be between 0 and 1")


@dataclass(frozen=True)
class Demands:
    """What `check` must prove or refuse. `secrecy`: the server learns nothing but sums. `privacy`: a budget of
    differential privacy."""

    secrecy: bool = False
    privacy: PrivacyDemand | None = None


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One experiment; its hash names the run."""

    task: Task
    federation: Federation
    work: Work
    stages: tuple[Stage, ...]
    aggregator: Aggregator = Sum()
    schedule: Schedule = Synchronous()
    evaluation: Evaluation = Evaluation()
    limits: Limits = Limits()
    demands: Demands = Demands()
    rounds: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rounds < 0:
            raise ConfigError(f"rounds is {self.rounds}; it must be 0 or more")

    @property
    def key(self) -> Key:
        """The run's public key."""
        return Key(self.seed).fold("run")

    def trains_in_round(self, name: str, round: int) -> bool:
        """True if a tensor trains in this round."""
        return self.task.scope.trains_in_round(name, round) and all(
            stage.trains_in_round(name, round, self.rounds) for stage in self.pipeline
        )

    @property
    def pipeline(self) -> tuple[Stage, ...]:
        """The stages of the round trip: `stages`, and first what keeps the tensors that the scope does not share, and
        the figures that a private client does not send."""
        share = self.task.scope.share
        first: list[Stage] = []
        if share != ("*",):
            first.append(Keep(tuple(f"!{pattern}" for pattern in share)))
        if self.private and self.evaluation.private:
            first.append(NoFigures())
        return (*first, *self.stages)

    @property
    def private(self) -> bool:
        """Whether a stage or the work promises differential privacy."""
        return any(isinstance(stage, PrivateStage) for stage in self.stages) or isinstance(self.work, DpSgd)
