"""The experiment: the frozen record of everything that decides a run's result."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fedllm.aggregate import Aggregator, Sum
from fedllm.diagnostics.settings import Diagnostics
from fedllm.errors import ConfigError
from fedllm.federation import Federation
from fedllm.rng import Key
from fedllm.stage import Stage
from fedllm.stages.keep import Keep
from fedllm.tasks.task import Task
from fedllm.work import Work


class Schedule:
    """Who talks when. A frozen dataclass of settings."""


@dataclass(frozen=True)
class Synchronous(Schedule):
    """A round ends when its whole cohort has answered or failed."""


@dataclass(frozen=True)
class Evaluation:
    """What is measured, when, and against what.

    Args:
        metrics: of nll, perplexity, exact_match, accuracy, rouge_l. every: rounds between evaluations; None: the
            base and the end only. by: a field of the records; figures by its values are added (`nll/private`).
        limit: held-out records per client at most. max_new_tokens: of generation. batch_size: of evaluation.
        compare: local_only (each client alone) and centralised (the pooled data) at the run's own learning rate, or
            at the best of `compare_lr` by loss on held-out records.
        best: the metric that chooses the best checkpoint; None: the first of `metrics`.
        diagnostics: of the clients' updates in each round, and alarms; None: none.
    """

    metrics: tuple[str, ...] = ("nll",)
    every: int | None = None
    by: str | None = None
    limit: int | None = None
    max_new_tokens: int = 16
    batch_size: int = 16
    compare: tuple[Literal["local_only", "centralised"], ...] = ()
    compare_lr: tuple[float, ...] = ()
    best: str | None = None
    diagnostics: Diagnostics | None = Diagnostics()

    def __post_init__(self) -> None:
        for name in ("every", "limit"):
            value = self.__dict__[name]
            if value is not None and value < 1:
                rest = "the end only" if name == "every" else "all records"
                raise ConfigError(f"evaluation.{name} is {value}; it must be 1 or more, or null for {rest}")
        for name in ("max_new_tokens", "batch_size"):
            if self.__dict__[name] < 1:
                raise ConfigError(f"evaluation.{name} is {self.__dict__[name]}; it must be 1 or more")
        for lr in self.compare_lr:
            if not 0 < lr < math.inf:
                raise ConfigError(f"evaluation.compare_lr holds {lr}; learning rates must be above 0 and finite")
        if self.best is not None and self.best not in self.metrics:
            raise ConfigError(f"evaluation.best is {self.best}, which is not among evaluation.metrics; add it there")


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

    def moves(self, name: str, round: int) -> bool:
        """True if a leaf trains in this round."""
        return self.task.scope.moves(name, round) and all(stage.moves(name, round) for stage in self.trip)

    @property
    def trip(self) -> tuple[Stage, ...]:
        """The stages of the round trip: `stages`, and first what keeps the leaves that the scope does not share."""
        share = self.task.scope.share
        if share == ("*",):
            return self.stages
        return (Keep(tuple(f"!{pattern}" for pattern in share)), *self.stages)
