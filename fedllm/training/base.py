"""Work: what a client does between receiving and sending. Written once, for a stack of K clients.

    carry = init(jobs)    carry = step(carry, batch, adjusts, model)  x n    finish(carry)

The serial engine is K = 1. `run_work` is the whole local loop; it is the only caller of the three.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from fedllm.messages.context import ClientNoise, Profile, RoundContext
from fedllm.messages.traits import Traits
from fedllm.messages.update import Update
from fedllm.models.batch import Batch, Example, collate
from fedllm.models.task import Phase
from fedllm.rng import Key
from fedllm.tensors.tree import Tree

ClientFacts = Mapping[str, float]
Adjust = Callable[[Tree, Tree], Tree]  # (grads, params) -> grads: a client's stage hooks
Outcome = tuple[Update, ClientFacts] | str  # what a client made, or why it failed


class Model(Protocol):
    """A loaded task, one per process."""

    @property
    def device(self) -> str:
        """Where it computes."""
        ...

    @property
    def why_not_stackable(self) -> str | None:
        """Why clients must train one at a time; None if they can be stacked."""
        ...

    @property
    def shares_prefixes(self) -> bool:
        """Whether what a client's sequences begin with in common need not be computed again."""
        ...

    def losses(self, stack: Tree, batch: Batch) -> Tensor:
        """(K,): one mean loss per client. The only caller of the objective."""
        ...

    def initial_params(self, key: Key) -> Tree:
        """The initial value of every tensor that a client trains."""
        ...

    def worked_out(self, params: Tree, job: ClientJob) -> Tree:
        """Tensors of the adapter that a client works out of its examples and does not train, at the end of its work."""
        ...


@dataclass(frozen=True, eq=False)
class ClientJob:
    """One client's share of a stack. `initial` may have tensors in any float type; examples are encoded.

    `adjust`: its stages' `grads` hooks; None if there are none. `frozen`: tensors that the passes need, and that do not
    train in this round. `noise`: where the client's secret noise comes from; None in estimates and dry runs. `phases`:
    the same for all clients of a stack; none: all trains at once.
    """

    ctx: RoundContext
    initial: Tree
    examples: Sequence[Example]
    adjust: Adjust | None = None
    frozen: Tree = field(default_factory=dict)
    noise: ClientNoise | None = None
    phases: Sequence[Phase] = ()

    @property
    def last(self) -> bool:
        """Whether this is the last round."""
        return self.ctx.round == self.ctx.rounds - 1

    def rng(self, purpose: str) -> torch.Generator:
        """The client's generator of this round."""
        return self.ctx.rng(purpose)


class Work:
    """A frozen dataclass of settings. `rule` names the local optimiser for stages that assume one.

    `max_length`: longest sequence in tokens. `lr`: learning rate. `per_example`: whether a step holds the gradient of
    each example of a micro-batch by itself.
    """

    batchable: ClassVar[bool] = True
    per_example: ClassVar[bool] = False
    max_length: int
    lr: float

    @property
    def traits(self) -> Traits:
        """What it declares, for `check`: the parts of its updates. A work without gradients loses `Fact.GRADIENTS`."""
        return Traits(makes=frozenset({"delta", "metrics", "counts"}))

    @property
    def rule(self) -> str:
        """The local update rule: "sgd", "momentum", "adamw", ..."""
        raise NotImplementedError

    @property
    def idle(self) -> str:
        """Why a client with these settings trains nothing; empty if it trains."""
        return ""

    def with_lr(self, *, lr: float, times: int) -> Work:
        """The same work at another learning rate, with `times` as many examples a step."""
        raise NotImplementedError

    def for_profile(self, profile: Profile) -> Work:
        """The same work as far as a client's device differs."""
        return self

    def plan(self, num_examples: int, ctx: RoundContext) -> Iterator[Sequence[Sequence[int]]]:
        """For each local step, the examples of each of its micro-batches, drawn with ctx.rng("batches")."""
        raise NotImplementedError

    def init(self, jobs: Sequence[ClientJob]) -> Any:
        """A carry for K clients."""
        raise NotImplementedError

    def step(self, carry: Any, micro: Sequence[Batch], jobs: Sequence[ClientJob], model: Model) -> Any:
        """One local step of all clients that have examples in `micro`; the others stand still."""
        raise NotImplementedError

    def finish(self, carry: Any) -> Sequence[Outcome]:
        """What each client made."""
        raise NotImplementedError


class Stopped(Exception):
    """The engine is closing: a stack stops between two steps."""


@dataclass(frozen=True)
class TrainOptions:
    """How a stack is trained. `recompute`: save memory (see `Batch`). `should_continue`: asked before each step."""

    recompute: bool = False
    should_continue: Callable[[], bool] = lambda: True


def run_work(
    work: Work, jobs: Sequence[ClientJob], model: Model, how: TrainOptions = TrainOptions()
) -> Sequence[Outcome]:
    """One pass of the local loop over a stack of clients, to the end of the longest plan.

    Raises:
        Stopped: `how.should_continue` said no.
    """
    return work.finish(run_steps(work, jobs, model, work.init(jobs), how))


def run_steps(
    work: Work, jobs: Sequence[ClientJob], model: Model, carry: Any, how: TrainOptions = TrainOptions()
) -> Any:
    """The steps of one round, from a carry to the next."""
    generators = tuple(job.ctx.rng("dropout") for job in jobs)
    for micro in batches(work, jobs):
        if not how.should_continue():
            raise Stopped
        made = [collate(chosen, generators, recompute=how.recompute, share=model.shares_prefixes) for chosen in micro]
        carry = work.step(carry, made, jobs, model)
    return carry


def batches(work: Work, jobs: Sequence[ClientJob]) -> Iterator[list[list[list[Example]]]]:
    """For each step, and each of its micro-batches, the examples of each client."""
    plans = [work.for_profile(job.ctx.profile).plan(len(job.examples), job.ctx) for job in jobs]
    for steps in zip_longest(*plans, fillvalue=()):
        yield [
            [
                [job.examples[index] for index in (step[place] if place < len(step) else ())]
                for job, step in zip(jobs, steps, strict=True)
            ]
            for place in range(max(map(len, steps)))  # none in a step for which nobody has drawn an example
        ]
