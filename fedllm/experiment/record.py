"""The experiment: the frozen record of everything that decides a run's result."""

from __future__ import annotations

from dataclasses import dataclass

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
from fedllm.training.base import Work


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
class Demands:
    """What `check` must prove or refuse. `secrecy`: the server learns nothing but sums."""

    secrecy: bool = False


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
            stage.trains_in_round(name, round) for stage in self.pipeline
        )

    @property
    def pipeline(self) -> tuple[Stage, ...]:
        """The stages of the round trip: `stages`, and first what keeps the tensors that the scope does not share."""
        share = self.task.scope.share
        if share == ("*",):
            return self.stages
        return (Keep(tuple(f"!{pattern}" for pattern in share)), *self.stages)
