"""Stacks of clients over one frozen model, a worker thread a core: the serial engine's results, several times faster.

A cohort is divided into stacks before anything is computed, so that the bits do not depend on who computes them when.
Workers take stacks from a queue, each with one thread: torch gives up the interpreter lock inside its operators, and
nothing waits at a barrier. Where a cohort has fewer clients than there are workers, a stack has the threads of those
that would be idle. Replies come in request order from a bounded window.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import torch

from fedllm.engines.allocator import freeze_gc, retain_freed_memory, single_arena
from fedllm.engines.base import Engine
from fedllm.engines.batched.load_balancing import Schedule, balance, stack_size
from fedllm.engines.batched.matmul_peak import matmul_peak
from fedllm.engines.batched.memory import (
    PRODUCTS,
    USABLE,
    MemoryBudget,
    MemoryEstimate,
    free_bytes,
    layout_bytes,
    parse_bytes,
    taken_bytes,
)
from fedllm.engines.batched.workers import WorkerPool
from fedllm.engines.client import Site
from fedllm.engines.loopback import ReceivedReply, one_by_one, receive, round_trip, with_heap_trim
from fedllm.engines.process_memory import address_space
from fedllm.engines.torch_threads import one_thread, torch_threads
from fedllm.errors import ConfigError
from fedllm.events import Emit, EngineAdjusted, EngineStarted, MemoryMeasured
from fedllm.experiment.record import Experiment
from fedllm.messages.call import Call, Replies
from fedllm.messages.update import Request
from fedllm.models.kernels.prepack import kept_layouts
from fedllm.models.kernels.threads import kernel_threads
from fedllm.models.layers.quantized_linear import num_parameters
from fedllm.training.client_stack import keep_buffers

STACK = {"cuda": 16}  # elsewhere as many as the clients' batches suggest
LOOKED_AT = 100  # clients, before the first round; one that comes later and does not fit ends the run then
SIDE_BY_SIDE = {"work": True, "evaluate": False}  # calls that clients answer at the same time, and whether in stacks


@dataclass(frozen=True)
class Batched(Engine):
    """The batched engine.

    Args:
        stack: clients a stack, at most; results depend on it within rounding. Default as many as compute 512 tokens in
            a micro-batch, from 4 to 16, or fewer so that each worker has a stack; on a GPU 16.
        workers: threads that train stacks. Default one a core, on a GPU one.
        threads: of each stack. Default one, or more where there are fewer stacks than workers. Results depend on it
            within rounding where PyTorch's operations compute, and not where kernels do.
        memory_budget: of all stacks together, as "2GB". Default 0.8 of the memory that is free at the start. With a
            budget, or a limit on the process's address space, the workers share one memory arena, and frozen weights
            are not laid out beforehand: smaller, and slower.
    """

    stack: int | None = None
    workers: int | None = None
    threads: int | None = None
    memory_budget: str | None = None

    def __post_init__(self) -> None:
        for name in ("stack", "workers", "threads"):
            value = self.__dict__[name]
            if value is not None and value < 1:
                raise ConfigError(f"engine.batched.{name} is {value}; it must be 1 or more")
        if self.memory_budget is not None:
            parse_bytes(self.memory_budget)

    @property
    def stacks(self) -> bool:
        """Always."""
        return True

    @contextmanager
    def open(self, experiment: Experiment, folder: Path | None, emit: Emit) -> Iterator[Call]:
        """Load the task and the clients' data; start the workers; answer calls until closed.

        Raises:
            RunError: the memory budget is below one of the first clients.
        """
        if self._scarce:
            single_arena()
        with one_thread(), retain_freed_memory(emptied=not self._scarce):
            site = Site.of(experiment, folder)
            kind = torch.device(site.model.device).type
            workers = self.workers or (1 if kind == "cuda" else cores())
            costs, budget = MemoryEstimate.measured(site.model, site.fresh), self._budget(site)
            layouts = 0 if self._scarce else layout_bytes(site.model, budget)
            gate, (now, most) = MemoryBudget(budget - layouts), taken_bytes(site.model.device)
            trainers = WorkerPool(experiment.work, site.model, costs, gate)
            trainers.admit(site.first_job(client) for client in site.population.clients[:LOOKED_AT])
            site.train = trainers.train
            laid_out = kept_layouts() if layouts else nullcontext()
            with freeze_gc(), laid_out, ThreadPoolExecutor(workers, initializer=self._begin_worker) as pool:
                schedule = Schedule(workers, *self._stacks(site, kind, workers), 1 if kind == "cuda" else self.threads)
                calls = BatchedCalls(site, trainers, pool, schedule, (now + layouts, most), emit, self._begin_worker)
                try:
                    yield with_heap_trim(calls.call)
                finally:
                    trainers.closing.set()
                    for each in (pool, *calls.few.values()):
                        each.shutdown(cancel_futures=True)

    @property
    def _scarce(self) -> bool:
        """Whether memory counts for more than speed."""
        return self.memory_budget is not None or address_space() is not None

    def _begin_worker(self) -> None:
        torch.set_num_threads(1)
        if not self._scarce:
            keep_buffers()

    def _stacks(self, site: Site, kind: str, workers: int) -> tuple[int, int | None]:
        """Clients a stack, and workers that each get as many. Bits depend on both, so they know nothing of memory."""
        if self.stack is not None or kind in STACK:
            return self.stack or STACK[kind], None
        return stack_size(site.batch_tokens(site.population.clients[:LOOKED_AT])), workers

    def _budget(self, site: Site) -> int:
        if self.memory_budget is not None:
            return parse_bytes(self.memory_budget)
        return int(USABLE * max(0, free_bytes(site.model.device) - site.base_versions.reserve(site.stages)))


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, eq=False)
class PendingReply:
    """A client that is asked: its reply is at `place` among those of its stack."""

    request: Request
    stack: Future[list[ReceivedReply]]
    place: int


@dataclass(eq=False)
class BatchedCalls:
    """Answers calls with the workers of a pool. `taken`: bytes of the process before any stack, with the laid-out
    weights to come, and at most so far. `few`: pools of as many workers as a cohort has stacks, where that is fewer: a
    stack of the next round finds the memory that its worker has freed, and does not touch that of another."""

    site: Site
    trainers: WorkerPool
    pool: ThreadPoolExecutor
    schedule: Schedule
    taken: tuple[int, int]
    emit: Emit
    begin_worker: Callable[[], None]
    started: bool = field(default=False)
    few: dict[int, ThreadPoolExecutor] = field(default_factory=dict)

    def call(self, name: str, requests: Mapping[str, Request]) -> Replies:
        """Replies in request order, from a bounded window: more stacks are made when workers + 1 are left."""
        schedule = self.schedule if SIDE_BY_SIDE.get(name) else replace(self.schedule, size=1, busy=None, threads=1)
        threads = schedule.threads_of(len(requests))
        if not self.started:
            self._start(threads[0])
        if name not in SIDE_BY_SIDE:
            yield from one_by_one(self.site, self.emit)(name, requests)
            return
        in_torch = 1 if self.site.model.trains_by_kernels else threads[0]
        with torch_threads(in_torch):
            yield from self._replies(name, requests, schedule, (in_torch, *threads))

    def _replies(
        self, name: str, requests: Mapping[str, Request], schedule: Schedule, threads: tuple[int, int, int]
    ) -> Replies:
        rest, under_way = iter(requests.values()), deque[PendingReply]()
        batches, round = deque(schedule.batches(len(requests))), 0
        pool = self._pool(sum(count for _, count in batches))
        while batches or under_way:
            while batches and len(under_way) <= schedule.workers * schedule.size:
                clients, stacks = batches.popleft()
                under_way.extend(self._submitted(pool, name, list(islice(rest, clients)), stacks, threads))
            pending = under_way.popleft()
            round, replies = pending.request.ctx.round, pending.stack.result()
            while self.trainers.notes:
                self.emit(EngineAdjusted(round, self.trainers.notes.pop(0)))
            yield str(pending.request.ctx.client), receive(name, pending.request, replies[pending.place], self.emit)
        if name == "work" and requests:
            predicted = max(self.taken[1], self.taken[0] + PRODUCTS + self.trainers.gate.peak)
            self.emit(MemoryMeasured(round, predicted, taken_bytes(self.site.model.device)[1]))

    def _pool(self, stacks: int) -> ThreadPoolExecutor:
        if stacks >= self.schedule.workers:
            return self.pool
        if stacks not in self.few:
            self.few[stacks] = ThreadPoolExecutor(max(1, stacks), initializer=self.begin_worker)
        return self.few[stacks]

    def _submitted(
        self, pool: ThreadPoolExecutor, name: str, batch: Sequence[Request], count: int, threads: tuple[int, int, int]
    ) -> list[PendingReply]:
        """In the order of the batch. Of clients of one stack, each takes its own reply."""
        in_torch, in_kernels, more = threads
        loads = [self.site.tokens(request.ctx) if count < len(batch) else 0 for request in batch]
        replies: dict[int, PendingReply] = {}
        for number, stack in enumerate(balance(loads, self.schedule.size, count)):
            asked, own = [batch[at] for at in stack], in_kernels + (number < more)
            future = pool.submit(self._answered, name, asked, in_torch, own)
            replies |= {at: PendingReply(batch[at], future, place) for place, at in enumerate(stack)}
        return [replies[at] for at in range(len(batch))]

    def _answered(self, name: str, asked: Sequence[Request], in_torch: int, in_kernels: int) -> list[ReceivedReply]:
        """What a worker does with a stack. Kernels give the same bits on any number of threads."""
        torch.set_num_threads(in_torch)  # and not back at the end: other workers of the call still compute
        with kernel_threads(in_kernels):
            return round_trip(self.site, name, asked)

    def _start(self, threads: int) -> None:
        self.started = True
        base, gate, schedule = self.site.model.base.model, self.trainers.gate, self.schedule
        peak = matmul_peak(self.pool, schedule.workers, base) if num_parameters(base) > 10**7 else None
        self.emit(EngineStarted(schedule.workers, schedule.size, gate.budget, num_parameters(base), peak, threads))
