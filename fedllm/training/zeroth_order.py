"""Local training without gradients: two forward passes tell how the loss changes along a random direction.

    g = (L(w + eps z) - L(w - eps z)) / (2 eps)        w <- w - lr g z        z ~ N(0, I)

Malladi et al. 2023 (MeZO), arXiv:2305.17333; federated on LoRA: FedMeZO, arXiv:2402.05926; with directions out of a
pool of seeds, so that seeds and numbers are all that is sent: FedKSeed, arXiv:2312.06353. No autograd graph is made,
and no memory is held beside the weights: z is drawn anew each time. A stack of K clients takes two passes a step, each
client with its own z.

E[g z] is the gradient, and its variance grows with the number of values that train. So the learning rate is smaller
than that of a gradient by orders of magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from fedllm.errors import ConfigError
from fedllm.messages.context import Profile, RoundContext
from fedllm.messages.traits import Fact, Traits
from fedllm.messages.update import Part
from fedllm.models.batch import Batch
from fedllm.rng import Key
from fedllm.tensors import tree
from fedllm.tensors.directions import add_direction_, seed_key
from fedllm.tensors.tree import Tree
from fedllm.training.base import ClientJob, Model, Outcome, Work
from fedllm.training.client_stack import BufferLayout, give_back
from fedllm.training.gradient_descent import GradientDescent
from fedllm.training.local_steps import on_device, outcome, require_steps, stacked, why_idle

SCALARS = "scalars"  # the part: what each seed of the pool was taken by


@dataclass(eq=False)
class Carry:
    """The running state of K clients: a (K, P) buffer of their weights."""

    works: Sequence[ZerothOrder]
    layout: BufferLayout
    values: Tensor
    starts: Sequence[Tree]
    held: Tree
    amounts: list[Tensor]  # of each client, (pool,)
    choices: list[torch.Generator]
    steps: list[int]
    tokens: list[int]
    computed: list[int]
    loss_sum: list[float]
    failed: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ZerothOrder(Work):
    """Steps along random directions. Exactly one of `steps` and `epochs` is set.

    Args:
        lr: learning rate. eps: how far a loss is looked at on both sides.
        batch_size: examples of a step. max_length: longest sequence in tokens.
        pool: directions come from this many seeds, and a client tells how far it went along each (FedKSeed); null: each
            step draws one of its own, and a client sends its weights.
        largest: a step along which the two losses differ by more is left out; null: none is.
        shared: all clients go along the same directions, one seed of the pool after another, so that the mean of their
            numbers is a step of the mean of their losses (DeComFL, arXiv:2405.15861).
    """

    lr: float = 1e-5
    steps: int | None = None
    epochs: int | None = None
    batch_size: int = 4
    max_length: int = 512
    eps: float = 1e-3
    pool: int | None = None
    largest: float | None = None
    shared: bool = False

    def __post_init__(self) -> None:
        own = "work.zeroth_order"
        require_steps(self, own, ("batch_size", "max_length", "pool"))
        if self.shared and (self.pool is None or self.steps is None):
            raise ConfigError(f"{own}.shared needs a pool and steps, by which all clients count alike; set both")
        for name in ("lr", "eps", "largest"):
            value = self.__dict__[name]
            if value is not None and not (0 <= value < math.inf and (value > 0 or name == "lr")):
                raise ConfigError(f"{own}.{name} is {value}; it must be above 0 and finite")

    @property
    def traits(self) -> Traits:
        """Of a pool, the part `scalars` beside the delta."""
        made = {"delta", "metrics", "counts", *([SCALARS] if self.pool is not None else [])}
        return Traits(makes=frozenset(made), loses=Fact.GRADIENTS)

    @property
    def rule(self) -> str:
        """Plain descent along what was found."""
        return "sgd"

    @property
    def idle(self) -> str:
        """Without steps, or with steps of no length."""
        return why_idle(self, "work.zeroth_order")

    def with_lr(self, *, lr: float, times: int) -> Self:
        """Larger batches: no memory is held for a backward pass."""
        return replace(self, lr=lr, batch_size=self.batch_size * times)

    def for_profile(self, profile: Profile) -> Self:
        """With the profile's steps, batch size and learning rate, where it has them: rates by client are FedMeZO's."""
        if self.shared and profile.steps not in (None, self.steps):
            raise ConfigError(
                f"a client's profile has {profile.steps} steps and work.zeroth_order.shared lets all take the same; "
                "leave out one of the two"
            )
        return on_device(self, profile)

    def plan(self, num_examples: int, ctx: RoundContext) -> Iterator[Sequence[Sequence[int]]]:
        """As of gradient descent."""
        same = GradientDescent(steps=self.steps, epochs=self.epochs, batch_size=self.batch_size)
        return same.plan(num_examples, ctx)

    def init(self, jobs: Sequence[ClientJob]) -> Carry:
        """Stack the starting points."""
        starts = [job.initial for job in jobs]
        layout = BufferLayout.of(starts)
        none = [0] * len(jobs)
        return Carry(
            works=[self.for_profile(job.ctx.profile) for job in jobs],
            layout=layout,
            values=layout.filled(starts),
            starts=starts,
            held=stacked([job.frozen for job in jobs]),
            amounts=[torch.zeros(self.pool or 0, dtype=layout.kind[0]) for _ in jobs],
            choices=[job.ctx.rng("directions") for job in jobs],
            steps=[*none],
            tokens=[*none],
            computed=[*none],
            loss_sum=[0.0] * len(jobs),
        )

    @torch.no_grad()
    def step(self, carry: Carry, micro: Sequence[Batch], jobs: Sequence[ClientJob], model: Model) -> Carry:
        """Two passes of the whole stack, without dropout, and each client's step along its direction."""
        batch = replace(micro[0], dropout=())
        active = [k for k in range(len(jobs)) if batch.counts[k] and k not in carry.failed]
        seeds = {k: self._seed(carry, k, jobs[k].ctx) for k in active}
        keys = {k: seed_key(seed) for k, seed in seeds.items()}
        above, below = self._surviving(carry, batch, keys, model)
        for k in keys.keys() - carry.failed.keys():
            one, two = above[k], below[k]
            work = carry.works[k]
            taken = work.largest is None or abs(one - two) <= work.largest
            amount = work.lr * (one - two) / (2 * work.eps) if taken else 0.0
            add_direction_(carry.layout.client(carry.values[k], k), keys[k], -amount)
            if self.pool is not None:
                carry.amounts[k][seeds[k]] += amount
            carry.steps[k] += 1
            carry.loss_sum[k] += (one + two) / 2
            carry.tokens[k] += 2 * batch.client_tokens[k]
            carry.computed[k] += 2 * batch.client_computed[k]
        return carry

    def finish(self, carry: Carry) -> Sequence[Outcome]:
        """Each client's delta, mean loss and counts; of a pool, how far it went along each seed. The carry ends."""
        found = [carry.failed.get(k) or self._outcome(carry, k) for k in range(len(carry.starts))]
        give_back(carry.values)
        return found

    def _seed(self, carry: Carry, k: int, ctx: RoundContext) -> int:
        """The number of a seed of the pool, or of one that nobody else has."""
        if self.shared and self.pool is not None and self.steps is not None:
            return (ctx.round * self.steps + carry.steps[k]) % self.pool
        return int(torch.randint(self.pool or 2**62, (1,), generator=carry.choices[k]))

    def _surviving(self, carry: Carry, batch: Batch, keys: dict[int, Key], model: Model) -> tuple[list[float], ...]:
        """The losses on both sides. A joint product may have spoilt those of other clients: where they are not finite,
        those of the client by itself count. One whose losses are not finite there either fails; its weights become
        zeros."""
        sides = tuple(self._losses(carry, batch, keys, model, sign) for sign in (1.0, -1.0))
        for k in [k for k in keys if not math.isfinite(sides[0][k] - sides[1][k])]:
            own = [self._alone(carry, batch, keys[k], model, k, sign) for sign in (1.0, -1.0)]
            if math.isfinite(own[0] - own[1]):
                sides[0][k], sides[1][k] = own
                continue
            carry.failed[k] = f"at step {carry.steps[k]} its loss is not finite; lower work.zeroth_order.lr or eps"
            carry.values[k].zero_()
        return sides

    def _alone(self, carry: Carry, batch: Batch, key: Key, model: Model, k: int, sign: float) -> float:
        """A client's loss by itself."""
        if len(carry.works) == 1:
            return math.nan
        alone = replace(
            carry,
            works=[carry.works[k]],
            layout=replace(carry.layout, own=[carry.layout.own[k]]),
            values=carry.values[k : k + 1],
            held={name: leaf[k : k + 1] for name, leaf in carry.held.items()},
        )
        return self._losses(alone, batch.only(k), {0: key}, model, sign)[0]

    def _losses(self, carry: Carry, batch: Batch, keys: dict[int, Key], model: Model, sign: float) -> list[float]:
        """(K,) losses at w + sign eps z; the weights are where they were, but for the last bits of a sum."""
        moved = [(carry.layout.client(carry.values[k], k), key, sign * carry.works[k].eps) for k, key in keys.items()]
        for own, key, far in moved:
            add_direction_(own, key, far)
        losses = model.losses({**carry.held, **carry.layout.stacked(carry.values)}, batch)
        assert losses.grad_fn is None, "a pass without gradients has made a graph"
        for own, key, far in moved:
            add_direction_(own, key, -far)
        return [float(loss) for loss in losses.double().cpu()]

    def _outcome(self, carry: Carry, k: int) -> Outcome:
        delta = carry.layout.moved(carry.values[k], k, carry.starts[k])
        if not tree.finite(delta):
            return f"after step {carry.steps[k]} its weights are not finite; lower work.zeroth_order.lr"
        facts = {"steps": carry.steps[k], "lr_sum": carry.works[k].lr * carry.steps[k], "tokens": carry.tokens[k],
                 "computed": carry.computed[k]}  # fmt: skip
        pool = {} if self.pool is None else {SCALARS: Part({"pool": carry.amounts[k]})}
        return outcome(delta, facts, carry.loss_sum[k], pool)
