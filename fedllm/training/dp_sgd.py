"""DP-SGD: local descent whose every step hides each single example. Privacy at the level of examples.

    B ~ each example by itself with probability q = min(1, b / n)       b: batch_size, n: the client's examples
    g = (sum_{i in B} clip(g_i) + N(0, (z C)^2 I)) / b                  clip(g) = g min(1, C / |g|), over all tensors
    w <- w - lr * rule(g)

Abadi et al. 2016, arXiv 1607.00133, algorithm 1. The divisor b is fixed: that of the drawn batch would tell its size. A
step for which nobody is drawn adds noise alone. Noise and clipped gradients are integers on a grid (`clipped_sums`).
One step is a Gaussian mechanism of noise multiplier z, sampled by Poisson at rate q.

What leaves the client is its change of the weights alone: mean losses, and how many tokens were trained, would tell of
its examples without noise.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from fedllm.errors import ClientError, ConfigError
from fedllm.messages.context import RoundContext
from fedllm.messages.traits import Fact, Traits
from fedllm.messages.update import Update
from fedllm.models.batch import Batch, Example
from fedllm.tensors.checksum import checksum
from fedllm.training.base import ClientJob, Model, Outcome
from fedllm.training.client_stack import give_back
from fedllm.training.clipped_sums import Clip
from fedllm.training.gradient_descent import Carry, GradientDescent
from fedllm.training.gradients import Stack
from fedllm.training.per_example_gradients import fill


@dataclass(eq=False)
class PrivateCarry(Carry):
    """`sums`: (K, P) clipped gradients, float64. `scratch`: (n, P), the gradients of a micro-batch's examples. `taken`:
    steps of the round `round`."""

    clips: Sequence[Clip] = ()
    digests: Sequence[bytes] = ()
    sums: Tensor = field(default_factory=lambda: torch.zeros(0))
    scratch: Tensor = field(default_factory=lambda: torch.zeros(0))
    round: int = -1
    taken: int = 0


@dataclass(frozen=True)
class DpSgd(GradientDescent):
    """DP-SGD (Abadi et al. 2016). Of the settings of `sgd`, these mean something else:

    `batch_size` is b, the expected number of examples a step, and `accumulation` divides it into that many
    micro-batches, which limits memory and changes nothing else. `steps` is set, never `epochs`: their number would tell
    how many examples there are. `clip_norm` is refused: it bounds the mean of a batch.

    Args:
        clip: C, the bound on the 2-norm of one example's gradient over all tensors that train.
        noise_multiplier: z, the noise's standard deviation over C; 0 is no noise. None: it is found from
            `demands.privacy`.
    """

    clip: float = 1.0
    noise_multiplier: float | None = None
    per_example: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.epochs is not None or self.steps is None:
            raise ConfigError(
                "work.dp_sgd needs steps and takes no epochs, which tell how many examples a client has; set steps"
            )
        if self.clip_norm is not None:
            raise ConfigError(
                "work.dp_sgd.clip_norm bounds the mean of a batch, which hides no example; set work.dp_sgd.clip"
            )
        super().__post_init__()
        if not 1e-30 <= self.clip <= 1e30:  # as of the private stages
            raise ConfigError(f"work.dp_sgd.clip is {self.clip}; it must be 1e-30 to 1e+30")
        noise = self.noise_multiplier
        if noise is not None and noise != 0 and not 1e-6 <= noise <= 1e6:
            raise ConfigError(f"work.dp_sgd.noise_multiplier is {noise}; it must be 0, or 1e-06 to 1e+06")

    @property
    def traits(self) -> Traits:
        """Its change of the weights alone; weights by examples would tell how many there are."""
        return Traits(makes=frozenset({"delta"}), needs=Fact.EQUAL_WEIGHTS)

    def with_lr(self, *, lr: float, times: int) -> Self:
        """More examples a step in as many more micro-batches."""
        more = {"batch_size": self.batch_size * times, "accumulation": self.accumulation * times}
        return replace(self, lr=lr, **more)  # type: ignore[arg-type]  # both are whole numbers

    def rate(self, num_examples: int) -> float:
        """q: the probability with which each example is in a step."""
        return min(1.0, self.batch_size / max(1, num_examples))

    def plan(self, num_examples: int, ctx: RoundContext) -> Iterator[Sequence[Sequence[int]]]:
        """Each example of each step by a coin of its own. The coins follow from the run's public key: whoever runs real
        clients must refuse that."""
        rate, size = self.rate(num_examples), -(-self.batch_size // self.accumulation)
        generator = ctx.rng("batches")
        for _ in range(self.num_steps(num_examples)):
            coins = torch.rand(num_examples, generator=generator, dtype=torch.float64)
            chosen = (coins < rate).nonzero().reshape(-1).tolist()
            yield [chosen[at : at + size] for at in range(0, len(chosen), size)]

    def init(self, jobs: Sequence[ClientJob]) -> PrivateCarry:
        """As of `GradientDescent`, with memory for the clipped sums.

        Raises:
            ConfigError: `noise_multiplier` is None.
        """
        noised, carry = self._noise > 0, super().init(jobs)
        sizes = [sum(leaf.numel() for leaf in job.initial.values()) for job in jobs]
        return PrivateCarry(
            **vars(carry),
            clips=[Clip(self.clip, size, noised) for size in sizes],
            digests=[_digest(job) if noised else b"" for job in jobs],
            sums=torch.zeros(carry.values.shape, dtype=torch.float64, device=carry.values.device),
        )

    def step(self, carry: Carry, micro: Sequence[Batch], jobs: Sequence[ClientJob], model: Model) -> Carry:
        """One step of all clients whose plan has not ended, also of those for which no example is drawn."""
        assert isinstance(carry, PrivateCarry)
        if carry.round != jobs[0].ctx.round:
            carry.round, carry.taken = jobs[0].ctx.round, 0
        losses = self._sum(carry, micro, model)
        for k, job in enumerate(jobs):
            if carry.taken < carry.works[k].num_steps(len(job.examples)):
                self._private_step(carry, k, job, losses[k])
        carry.taken += 1
        return carry

    def finish(self, carry: Carry) -> Sequence[Outcome]:
        """Each client's delta (local - global), and nothing else. The carry ends here."""
        assert isinstance(carry, PrivateCarry)
        found = super().finish(carry)
        give_back(carry.values, carry.grads, carry.scratch)
        return found

    @property
    def _noise(self) -> float:
        if self.noise_multiplier is None:
            raise ConfigError(
                "work.dp_sgd.noise_multiplier is not set; set it, or demands.privacy.target_epsilon to find it"
            )
        return self.noise_multiplier

    @property
    def _advice(self) -> str:
        return "lower work.dp_sgd.lr"

    def _outcome(self, carry: Carry, k: int) -> Outcome:
        outcome = super()._outcome(carry, k)
        return outcome if isinstance(outcome, str) else (Update({"delta": outcome[0].parts["delta"]}), outcome[1])

    def _sum(self, carry: PrivateCarry, micro: Sequence[Batch], model: Model) -> list[float]:
        """The clients' clipped sums; the mean loss of each one's examples."""
        carry.sums.zero_()
        losses, counts = [0.0] * len(carry.works), [0] * len(carry.works)
        for batch in micro:
            owners = batch.sequence_clients
            stack = self._examples(carry, owners)
            found, at = fill(stack, batch.apart, model).tolist(), 0
            for k, count in enumerate(batch.counts):
                if count:
                    carry.clips[k].add(carry.sums[k], stack.gradient[at : at + count])
                losses[k] += math.fsum(found[at : at + count])
                counts[k] += count
                carry.tokens[k] += batch.client_tokens[k]
                carry.computed[k] += batch.client_tokens[k] - batch.unseen[k]
                at += count
        return [loss / max(1, count) for loss, count in zip(losses, counts, strict=True)]

    def _examples(self, carry: PrivateCarry, owners: Tensor) -> Stack:
        """A stack whose clients are examples, each with the weights of its owner."""
        count = len(owners)
        if len(carry.scratch) < count:
            carry.scratch = carry.layout.zeros(count)
        owners = owners.to(carry.values.device)

        def own(rows: Tensor) -> Tensor:
            return rows.expand(count, *rows.shape[1:]) if len(rows) == 1 else rows.index_select(0, owners)

        held = {name: own(leaf) for name, leaf in carry.held.items()}
        return Stack(own(carry.values.detach()), carry.scratch[:count], carry.layout.stacked, held)

    def _private_step(self, carry: PrivateCarry, k: int, job: ClientJob, loss: float) -> None:
        first = carry.steps[k] == 0 and self._noise > 0
        before = carry.values[k].detach().clone() if first else None
        with torch.no_grad():
            self._release(carry, k, job)
        self._client_step(carry, k, job, loss)
        if before is not None and carry.lr_sum[k] > 0:
            _require_moved(carry, k, before, str(job.ctx.client))

    def _release(self, carry: PrivateCarry, k: int, job: ClientJob) -> None:
        """The client's gradient: its clipped sum and noise, over the expected batch size."""
        clip, gradient = carry.clips[k], carry.layout.client(carry.grads[k], k)
        sums, noise = carry.layout.client(carry.sums[k], k), self._drawn(carry, k, job)
        scale, at = clip.unit / carry.works[k].batch_size, 0
        for name in sorted(gradient):  # the same order in a stack of padded clients as alone
            leaf = gradient[name]
            total = sums[name]
            if noise is not None:
                total = total + noise[at : at + leaf.numel()].view(leaf.shape).to(total.device)
            leaf.copy_(total * scale)
            at += leaf.numel()

    def _drawn(self, carry: PrivateCarry, k: int, job: ClientJob) -> Tensor | None:
        """(d,) whole numbers of steps of the grid; None without noise."""
        if not self._noise:
            return None
        source, clip = job.noise, carry.clips[k]
        if source is None:
            raise ConfigError(
                f"client {job.ctx.client}: work.dp_sgd has no source of secret noise here; run it by fedllm.run, or "
                "set work.dp_sgd.noise_multiplier to 0"
            )
        purpose = f"dp_sgd/{carry.taken}/{self._noise!r}"  # the same draws at another scale would show the sum
        stream = source.stream(purpose, carry.digests[k])
        return torch.from_numpy(stream.discrete_gaussian(self._noise * clip.levels, clip.size))


def _digest(job: ClientJob) -> bytes:
    """Of all that a round is computed from. The same noise on other weights or examples would show how far their sums
    are apart."""
    state = hashlib.sha256(checksum({**job.frozen, **job.initial}).encode())
    for example in job.examples:
        state.update(_bytes(example))
    return state.digest()


def _bytes(example: Example) -> bytes:
    both: bytes = torch.stack([example.tokens, example.targets]).numpy().tobytes()
    return len(example.tokens).to_bytes(8, "big") + both


def _require_moved(carry: PrivateCarry, k: int, before: Tensor, client: str) -> None:
    """The first noised step moved each tensor, in the memory that the model reads.

    Raises:
        ClientError: it did not, as where an optimiser holds copies of the weights (opacus #820): noise would be
            accounted for, and nothing trained.
    """
    row = carry.values[k]
    stepped = carry.optimizers[k].param_groups[0]["params"][0]
    old, new, gradient = (carry.layout.client(values.detach(), k) for values in (before, row, carry.grads[k]))
    still = [name for name in new if bool(gradient[name].any()) and torch.equal(old[name], new[name])]
    if stepped.data_ptr() != row.data_ptr() or still:
        what = f"{still[0]} has not moved" if still else "the optimiser holds other values than the model reads"
        raise ClientError(
            f"client {client}, first step of work.dp_sgd: {what}, so that privacy would be spent and nothing trained; "
            "use a work whose optimiser steps the rows of its stack"
        )
