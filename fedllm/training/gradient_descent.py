"""Local gradient descent: SGD or AdamW, for a stack of K clients in one forward and backward pass.

    w <- w - lr * rule(grad L_k(w))        L_k: mean over the client's batch of the per-example losses

One loss per client, their sum differentiated once: client k's slice of each stacked tensor receives exactly its own
gradient. Each client has an optimiser of its own on its row of the buffer, so idle and failed clients stand still.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Self

import torch
from torch import Tensor

from fedllm.errors import ConfigError, config_name
from fedllm.messages.context import Profile, RoundContext
from fedllm.models.batch import Batch
from fedllm.tensors import tree
from fedllm.tensors.flat_tree import copy_into
from fedllm.tensors.tree import Tree
from fedllm.training.base import ClientJob, Model, Outcome, Work
from fedllm.training.client_stack import BufferLayout, give_back
from fedllm.training.gradients import Stack, surviving
from fedllm.training.local_steps import on_device, outcome, require_steps, stacked, why_idle
from fedllm.training.lr_schedule import LrSchedule


@dataclass(eq=False)
class Carry:
    """The running state of K clients: (K, P) buffers of their weights and gradients."""

    works: Sequence[GradientDescent]
    layout: BufferLayout
    values: Tensor
    starts: Sequence[Tree]
    held: Tree  # (K, ...): tensors that stand still
    grads: Tensor
    optimizers: Sequence[torch.optim.Optimizer]
    steps: list[int]
    tokens: list[int]
    computed: list[int]  # without what was computed once for several sequences
    loss_sum: list[float]
    lr_sum: list[float]
    failed: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class GradientDescent(Work):
    """Settings and steps of local gradient descent; `Sgd` and `DpSgd` differ in the gradient that a step takes.

    Args:
        lr: learning rate; `lr_schedule` multiplies it. momentum: of SGD. betas, eps: of AdamW.
        batch_size: examples a micro-batch; `accumulation` micro-batches make one step.
        clip_norm: bound on the 2-norm of a client's gradient, before the optimiser and after the stages' hooks.
        max_length: longest sequence in tokens; what is longer is cut (see the template).
    """

    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 1e-3
    steps: int | None = None
    epochs: int | None = None
    batch_size: int = 4
    accumulation: int = 1
    max_length: int = 512
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip_norm: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    lr_schedule: LrSchedule = LrSchedule()

    def __post_init__(self) -> None:
        own = f"work.{config_name(self)}"
        require_steps(self, own, ("batch_size", "accumulation", "max_length"))
        for name in ("lr", "momentum", "weight_decay", "eps", "clip_norm"):
            value = self.__dict__[name]
            if value is not None and not 0 <= value < math.inf:
                raise ConfigError(f"{own}.{name} is {value}; it must be 0 or more and finite")
        if self.clip_norm == 0:
            raise ConfigError(f"{own}.clip_norm is 0, which lets nothing train; null is no clipping")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"{own}.betas is {list(self.betas)}; both must be in [0, 1)")
        if self.optimizer == "adamw" and self.momentum:
            raise ConfigError(f"{own}.momentum belongs to optimizer sgd; for adamw set betas")

    @property
    def rule(self) -> str:
        """One of "sgd", "momentum" (SGD with momentum) and "adamw"."""
        return "momentum" if self.optimizer == "sgd" and self.momentum else self.optimizer

    @property
    def idle(self) -> str:
        """Without steps, or with steps of no length."""
        return why_idle(self, f"work.{config_name(self)}")

    def with_lr(self, *, lr: float, times: int) -> Self:
        """More micro-batches a step, so that memory stays as it is."""
        return replace(self, lr=lr, accumulation=self.accumulation * times)

    def for_profile(self, profile: Profile) -> Self:
        """With the profile's steps (instead of steps or epochs), batch size and learning rate, where it has them."""
        return on_device(self, profile)

    def num_steps(self, num_examples: int) -> int:
        """Local steps of a round."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return self.epochs * math.ceil(num_examples / (self.batch_size * self.accumulation))

    def plan(self, num_examples: int, ctx: RoundContext) -> Iterator[Sequence[Sequence[int]]]:
        """Batches from a stream of permutations; with `epochs` a step does not reach over a permutation's end."""
        generator, size = ctx.rng("batches"), self.batch_size * self.accumulation
        if not num_examples:
            return
        pending: list[int] = []
        for _ in range(self.num_steps(num_examples)):
            while len(pending) < (1 if self.steps is None else size):
                pending += torch.randperm(num_examples, generator=generator).tolist()
            chosen, pending = pending[:size], pending[size:]
            yield [chosen[at : at + self.batch_size] for at in range(0, len(chosen), self.batch_size)]

    def init(self, jobs: Sequence[ClientJob]) -> Carry:
        """Stack the starting points and give every client an optimiser on its row."""
        starts, works = [job.initial for job in jobs], [self.for_profile(job.ctx.profile) for job in jobs]
        layout = BufferLayout.of(starts)
        values = layout.filled(starts)
        grads = layout.zeros(len(jobs))
        return Carry(
            works=works,
            layout=layout,
            values=values,
            starts=starts,
            held=stacked([job.frozen for job in jobs]),
            grads=grads,
            optimizers=[work._optimizer(row, grad) for work, row, grad in zip(works, values, grads, strict=True)],
            steps=[0] * len(jobs),
            tokens=[0] * len(jobs),
            computed=[0] * len(jobs),
            loss_sum=[0.0] * len(jobs),
            lr_sum=[0.0] * len(jobs),
        )

    def step(self, carry: Carry, micro: Sequence[Batch], jobs: Sequence[ClientJob], model: Model) -> Carry:
        """One step: losses and gradients of all clients, then each client's hooks, clipping and optimiser."""
        active = [k for k in range(len(jobs)) if k not in carry.failed and any(batch.counts[k] for batch in micro)]
        stack = Stack(carry.values, carry.grads, carry.layout.stacked, carry.held)
        losses, failed = surviving(stack, micro, model, carry.failed)
        carry.failed |= {k: f"at step {carry.steps[k]} {reason}" for k, reason in failed.items()}
        for k in active:
            if k not in failed:
                self._client_step(carry, k, jobs[k], float(losses[k]))
                carry.tokens[k] += sum(batch.client_tokens[k] for batch in micro)
                carry.computed[k] += sum(batch.client_computed[k] for batch in micro)
        return carry

    def finish(self, carry: Carry) -> Sequence[Outcome]:
        """Each client's delta (local - global), mean loss and counts. The carry ends here."""
        clients = range(len(carry.starts))
        found = [carry.failed[k] if k in carry.failed else self._outcome(carry, k) for k in clients]
        give_back(carry.values, carry.grads)
        return found

    @property
    def _advice(self) -> str:
        """What to do about values that are not finite."""
        return "lower work.sgd.lr or set work.sgd.clip_norm"

    def _outcome(self, carry: Carry, k: int) -> Outcome:
        delta = carry.layout.moved(carry.values[k], k, carry.starts[k])
        if not tree.finite(delta):
            return f"after step {carry.steps[k]} its weights are not finite; {self._advice}"
        facts = {"steps": carry.steps[k], "lr_sum": carry.lr_sum[k], "tokens": carry.tokens[k]}
        return outcome(delta, {**facts, "computed": carry.computed[k]}, carry.loss_sum[k])

    def _client_step(self, carry: Carry, k: int, job: ClientJob, loss: float) -> None:
        work, grads = carry.works[k], carry.grads[k]
        with torch.no_grad():
            if job.adjust is not None:
                own = carry.layout.client(grads, k)
                copy_into(own, job.adjust(own, carry.layout.client(carry.values[k], k)))
            if work.clip_norm is not None:
                grads.mul_(min(1.0, work.clip_norm / max(tree.norm({"grads": grads}), 1e-300)))
        lr = work.lr * work.lr_schedule.factor(
            step=carry.steps[k],
            steps=work.num_steps(len(job.examples)),
            round=job.ctx.round,
            rounds=job.ctx.rounds,
        )
        carry.optimizers[k].param_groups[0]["lr"] = lr
        carry.optimizers[k].step()
        carry.steps[k] += 1
        carry.loss_sum[k] += loss
        carry.lr_sum[k] += lr

    def _optimizer(self, row: Tensor, grad: Tensor) -> torch.optim.Optimizer:
        row.grad = grad
        fused = row.dtype in (torch.float32, torch.float64)
        if self.optimizer == "adamw":
            return torch.optim.AdamW(
                [row], lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay, fused=fused
            )
        return torch.optim.SGD([row], lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay, fused=fused)
