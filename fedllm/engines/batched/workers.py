"""A worker pool: threads that train stacks of clients side by side, within a budget of memory.

A stack that does not fit waits until others are done (same bits), then keeps less for its gradient (same bits), then is
cut in halves. Memory that runs out all the same is caught, and the stack is repeated from its start.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from fedllm.engines.batched.memory import MemoryBudget, MemoryEstimate
from fedllm.errors import RunError
from fedllm.models.loaded_model import LoadedModel
from fedllm.training.base import ClientJob, Outcome, TrainOptions, Work
from fedllm.training.phases import run_phases

MEGA = 10**6


@dataclass(eq=False)
class WorkerPool:
    """Trains stacks for the worker threads. `notes`: what it had to do about memory, to be told."""

    work: Work
    model: LoadedModel
    costs: MemoryEstimate
    gate: MemoryBudget
    notes: list[str] = field(default_factory=list)
    closing: threading.Event = field(default_factory=threading.Event)

    def admit(self, jobs: Iterable[ClientJob]) -> None:
        """Look whether each of some clients fits, before anything is trained.

        Raises:
            RunError: one of them alone does not fit; names the neediest.
        """
        needs = {str(job.ctx.client): self.costs.of(self.work, [job], recompute=True) for job in jobs}
        client = max(needs, key=needs.__getitem__)
        if needs[client] > self.gate.budget:
            raise self._too_small(client, needs[client])

    def train(self, jobs: Sequence[ClientJob], model: LoadedModel) -> Sequence[Outcome]:
        """A stack of clients, in order, on the model of their round.

        Raises:
            RunError: one client alone does not fit.
            Halted: the engine is closing.
        """
        whole, less = (self.costs.of(self.work, jobs, recompute=recompute) for recompute in (False, True))
        names = ", ".join(str(job.ctx.client) for job in jobs)
        if whole <= self.gate.budget:
            # then, if memory runs out all the same: alone, and with less kept
            tries = [(False, whole), (False, self.gate.budget), (True, self.gate.budget)]
        elif less <= self.gate.budget:
            self._note(f"the stack of {names} would take {_size(whole)}: its layers are computed twice")
            tries = [(True, less), (True, self.gate.budget)]
        else:
            return self._halves(jobs, model, names, less)
        for recompute, need in tries:
            outcomes = self._tried(jobs, model, recompute, need)
            if outcomes is not None:
                return outcomes
            self._note(f"memory ran out in the stack of {names}: it is repeated from its start")
        return self._halves(jobs, model, names, less)

    def _halves(self, jobs: Sequence[ClientJob], model: LoadedModel, names: str, need: int) -> Sequence[Outcome]:
        if len(jobs) == 1:
            raise self._too_small(names, need)
        self._note(f"the stack of {names} does not fit {_size(self.gate.budget)}: it is cut in halves")
        half = len(jobs) // 2
        return [*self.train(jobs[:half], model), *self.train(jobs[half:], model)]

    def _tried(
        self, jobs: Sequence[ClientJob], model: LoadedModel, recompute: bool, need: int
    ) -> Sequence[Outcome] | None:
        """None where memory ran out."""
        with self.gate.room(need):
            try:
                how = TrainOptions(recompute=recompute, should_continue=lambda: not self.closing.is_set())
                return run_phases(self.work, jobs, model, how)
            except (torch.OutOfMemoryError, MemoryError):
                pass
            except RuntimeError as error:
                if "can't allocate memory" not in str(error):  # torch's CPU allocator has no type of its own
                    raise
        if self.model.device.startswith("cuda"):
            torch.cuda.empty_cache()
        return None

    def _too_small(self, client: str, need: int) -> RunError:
        return RunError(
            f"client {client} needs {_size(need)} of memory for one local step, and the budget is "
            f"{_size(self.gate.budget)}; raise engine.batched.memory_budget to {_size(need)}, or lower the work's "
            "batch_size or max_length"
        )

    def _note(self, text: str) -> None:
        self.notes.append(text)


def _size(count: int) -> str:
    """Rounded up: a budget of what is written here suffices."""
    return f"{-(-count // MEGA) / 1000:.3f}GB"
