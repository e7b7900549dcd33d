"""Stacks of clients over one frozen model, a worker thread a core: the serial engine's results, several times faster.

A cohort is cut into stacks of a fixed size, in its order, so that the bits do not depend on the workers. Workers take
stacks from a queue, each with one intra-op thread: torch gives up the interpreter lock inside its operators, and
nothing waits at a barrier. Replies come in request order from a bounded window.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from fedllm import wire
from fedllm.aggregate import Call, Replies
from fedllm.client import Site
from fedllm.engine import Engine
from fedllm.engines.crew import Crew
from fedllm.engines.exchange import Reply, answers, one_by_one, received
from fedllm.engines.memory import PRODUCTS, USABLE, Costs, Gate, address_space, free_bytes, parse_bytes, taken_bytes
from fedllm.engines.peak import matmul_peak
from fedllm.engines.threads import one_thread
from fedllm.errors import ConfigError
from fedllm.events import Emit, EngineAdjusted, EngineStarted, MemoryMeasured
from fedllm.experiment import Experiment
from fedllm.heap import kept_memory, one_heap
from fedllm.update import Request

STACK = {"cpu": 4, "cuda": 16}
LOOKED_AT = 100  # clients, before the first round; one that comes later and does not fit ends the run then
SIDE_BY_SIDE = {"work": True, "evaluate": False}  # calls that clients answer at the same time, and whether in stacks


@dataclass(frozen=True)
class Batched(Engine):
    """The batched engine.

    Args:
        stack: clients a stack; results depend on it within rounding, on nothing else here. Default 4, on a GPU 16.
        workers: threads. Default one a core, on a GPU one.
        memory_budget: of all stacks together, as "2GB". Default 0.8 of the memory that is free at the start. With a
            budget, or a limit on the process's address space, the workers share one heap: smaller, and slower.
    """

    stack: int | None = None
    workers: int | None = None
    memory_budget: str | None = None

    def __post_init__(self) -> None:
        for name in ("stack", "workers"):
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
        if self.memory_budget is not None or address_space() is not None:
            one_heap()
        with one_thread(), kept_memory():
            site = Site.of(experiment, folder)
            kind = torch.device(site.model.device).type
            workers = self.workers or (1 if kind == "cuda" else os.cpu_count() or 1)
            costs, gate = Costs.measured(site.model, site.fresh), Gate(self._budget(site.model.device))
            taken = taken_bytes(site.model.device)
            crew = Crew(experiment.work, site.model, costs, gate)
            crew.admit(site.first_job(client) for client in site.population.clients[:LOOKED_AT])
            site.train = crew.train
            with ThreadPoolExecutor(workers, initializer=partial(torch.set_num_threads, 1)) as pool:
                shop = Shop(site, crew, pool, workers, self.stack or STACK.get(kind, 4), taken, emit)
                try:
                    yield shop.call
                finally:
                    crew.closing.set()
                    pool.shutdown(cancel_futures=True)

    def _budget(self, device: str) -> int:
        if self.memory_budget is not None:
            return parse_bytes(self.memory_budget)
        return int(USABLE * free_bytes(device))


@dataclass(eq=False)
class Shop:
    """Answers calls with the workers of a pool. `taken`: bytes of the process before any stack, now and at most."""

    site: Site
    crew: Crew
    pool: ThreadPoolExecutor
    workers: int
    stack: int
    taken: tuple[int, int]
    emit: Emit
    started: bool = field(default=False)

    def call(self, name: str, requests: Mapping[str, Request]) -> Replies:
        """Replies in request order; at most workers + 1 stacks are under way."""
        if not self.started:
            self._start()
        if name not in SIDE_BY_SIDE:
            yield from one_by_one(self.site, self.emit)(name, requests)
            return
        size = self.stack if SIDE_BY_SIDE[name] else 1
        todo = (self._submitted(name, part) for part in _cut(requests, size))
        under_way, round = deque(islice(todo, self.workers + 1)), 0
        while under_way:
            part, sizes, future = under_way.popleft()
            round = part[0].ctx.round
            replies = future.result()
            while self.crew.notes:
                self.emit(EngineAdjusted(round, self.crew.notes.pop(0)))
            for request, sent, reply in zip(part, sizes, replies, strict=True):
                yield str(request.ctx.client), received(name, request, sent, reply, self.emit)
            under_way.extend(islice(todo, 1))
        if name == "work" and requests:
            predicted = max(self.taken[1], self.taken[0] + PRODUCTS + self.crew.gate.peak)
            self.emit(MemoryMeasured(round, predicted, taken_bytes(self.site.model.device)[1]))

    def _submitted(
        self, name: str, part: Sequence[Request]
    ) -> tuple[Sequence[Request], list[int], Future[list[Reply]]]:
        sent = [wire.pack(request) for request in part]
        return part, [len(data) for data in sent], self.pool.submit(answers, self.site, name, sent)

    def _start(self) -> None:
        self.started = True
        base = self.site.model.base.model
        peak = matmul_peak(self.pool, self.workers, base) if base.num_parameters() > 10**7 else None
        self.emit(EngineStarted(self.workers, self.stack, self.crew.gate.budget, base.num_parameters(), peak))


def _cut(requests: Mapping[str, Request], size: int) -> Iterator[Sequence[Request]]:
    rest = iter(requests.values())
    while part := list(islice(rest, size)):
        yield part
