"""A task whose runs can be worked out by hand, for `fedllm.run` itself: clients with f_k(w) = 1/2 sum a_k (w - b_k)².

A record holds a_k and b_k, an example carries them as tokens, the adapter has three numbers in two leaves, and the
objective is f_k. All of check, engine, wire, loop, work and checkpoints is real; the language model is loaded and idle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from safetensors.torch import save_file

from fedllm.data.federation import Federation, Population
from fedllm.evaluation.settings import Evaluation
from fedllm.experiment.record import Experiment, Limits
from fedllm.models.adapters.base import Adapter
from fedllm.models.batch import Example
from fedllm.models.objectives.base import Objective
from fedllm.models.task import Task
from fedllm.runs import launch
from fedllm.stages.base import Stage
from fedllm.training.sgd import Sgd

LR = 0.1


@dataclass(frozen=True)
class Client:
    """f(w) = 1/2 sum a (w - b)², held `examples` times."""

    a: tuple[int, int, int]
    b: tuple[int, int, int]
    examples: int

    @property
    def curve(self) -> np.ndarray:
        return np.array(self.a, float)

    @property
    def centre(self) -> np.ndarray:
        return np.array(self.b, float)


ONE, TWO = Client((1, 2, 1), (1, -2, 4), examples=3), Client((4, 1, 2), (-3, 2, 0), examples=1)
CLIENTS = (ONE, TWO)


@dataclass(frozen=True)
class Numbers(Adapter):
    """Three numbers that start at zero, as leaves `x` (2, 1) and `y` (1,)."""

    stackable: ClassVar[bool] = True

    def attach(self, base):
        return AttachedNumbers()


@dataclass(frozen=True)
class AttachedNumbers:
    def initial_params(self, key):
        return {"x": torch.zeros(2, 1, dtype=torch.float64), "y": torch.zeros(1, dtype=torch.float64)}

    def save(self, params, folder, base_name):
        save_file(dict(params), folder / "numbers.safetensors")


@dataclass(frozen=True)
class Bowl(Objective):
    """f_k, in place of a language model's loss."""

    def encode(self, records, tokenizer, template, max_length):
        listed = [torch.tensor([*record["a"], *record["b"]]) for record in records]
        return [Example(tokens, torch.zeros_like(tokens)) for tokens in listed]

    def __call__(self, model, stack, batch):
        w = torch.cat([stack[name].flatten(1) for name in sorted(stack)], 1)
        a, b = batch.tokens.reshape(-1, 2, 3).double().unbind(1)
        losses = (a * (w[batch.sequence_clients] - b) ** 2).sum(1) / 2
        counts = torch.tensor(batch.counts).clamp(min=1)
        return torch.zeros(len(counts), dtype=w.dtype).index_add(0, batch.sequence_clients, losses) / counts


@dataclass(frozen=True)
class Bowls(Federation):
    clients: tuple[Client, ...] = CLIENTS

    def load(self, key):
        records = {f"client-{k}": [{"a": c.a, "b": c.b}] * c.examples for k, c in enumerate(self.clients)}
        return Population(train=records, heldout={name: [] for name in records})

    def sample(self, clients, round, key):
        return list(clients)


def quadratic(stages: Sequence[Stage], rounds: int, *, steps: int) -> Experiment:
    return Experiment(
        task=Task("tiny-llama", adapter=Numbers(), objective=Bowl()),
        federation=Bowls(),
        work=Sgd(lr=LR, steps=steps, batch_size=2),
        stages=tuple(stages),
        evaluation=Evaluation(metrics=()),
        limits=Limits(checkpoint_every=1000),
        rounds=rounds,
    )


def end(stages: Sequence[Stage], rounds: int, folder: Path, *, steps: int) -> np.ndarray:
    """Where a run ends, through `launch.run`."""
    return flat(launch.run(quadratic(stages, rounds, steps=steps), engine="serial", out=folder).params)


def flat(params: Mapping[str, torch.Tensor]) -> np.ndarray:
    return np.concatenate([params[name].numpy().reshape(-1) for name in sorted(params)])


def optimum(weights: Sequence[float] = (1, 1)) -> np.ndarray:
    """The minimum of sum_k p_k f_k: sum p a b / sum p a, entry by entry."""
    terms = [(p * c.curve, c.centre) for p, c in zip(weights, CLIENTS, strict=True)]
    return sum(pa * b for pa, b in terms) / sum(pa for pa, _ in terms)


def fixed_point(steps: int, weights: Sequence[float], mu: float = 0.0) -> np.ndarray:
    """Where FedAvg (mu = 0) and FedProx stop.

    A local step is w <- w - lr (a (w - b) + mu (w - w_0)), so `steps` of them take a client from w_0 to

        w_0 + q (b - w_0)        q = (1 - (1 - lr (a + mu))^steps) a / (a + mu)

    The server stands still where sum_k p_k q_k (b_k - w) = 0: w = sum p q b / sum p q. With one step q = lr a, which is
    the optimum; with more, clients with flat losses count for too much.
    """
    terms = [
        (p * (1 - (1 - LR * (c.curve + mu)) ** steps) * c.curve / (c.curve + mu), c.centre)
        for p, c in zip(weights, CLIENTS, strict=True)
    ]
    return sum(q * b for q, b in terms) / sum(q for q, _ in terms)
