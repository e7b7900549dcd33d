"""Settings of evaluation and diagnostics: what is measured in a run, and the thresholds of the warnings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

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


@dataclass(frozen=True)
class Personal:
    """After the last round each client's own model is scored on its own, the others' and all held-out records.

    Args:
        clients: whose models, at most, and on whose records, spread evenly over all; the cost is this many evaluations
            of their held-out records together.
    """

    clients: int = 16

    def __post_init__(self) -> None:
        if self.clients < 1:
            raise ConfigError(f"evaluation.personal.clients is {self.clients}; it must be 1 or more")


@dataclass(frozen=True)
class Evaluation:
    """What is measured, when, and against what.

    Args:
        metrics: of nll, perplexity, exact_match, accuracy, rouge_l. every: rounds between evaluations; None: the
            base and the end only. by: a field of the records; figures by its values are added (`nll/private`).
        limit: held-out records per client at most. max_new_tokens: of generation. batch_size: of evaluation.
        compare: local_only (each client alone), fedavg (the plain federated model: the same experiment with every
            tensor shared, averaged by examples) and centralised (the pooled data), at the run's own learning rate;
            local_only and centralised at the best of `compare_lr`, if given, by loss on held-out records.
        best: the metric that chooses the best checkpoint; None: the first of `metrics`.
        diagnostics: of the clients' updates in each round, and alarms; None: none.
        private: in a run with differential privacy no loss, count or score leaves a client, and nobody looks at a
            single update. False: they do, outside of the guarantee.
        personal: of the clients' own models, on each other's records; None: none.
    """

    metrics: tuple[str, ...] = ("nll",)
    every: int | None = None
    by: str | None = None
    limit: int | None = None
    max_new_tokens: int = 16
    batch_size: int = 16
    compare: tuple[Literal["local_only", "fedavg", "centralised"], ...] = ()
    compare_lr: tuple[float, ...] = ()
    best: str | None = None
    diagnostics: Diagnostics | None = Diagnostics()
    private: bool = True
    personal: Personal | None = None

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
