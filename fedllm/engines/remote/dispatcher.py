"""Calls to clients in other processes: stacks under way, each to the process where its clients' sessions are.

The clients at the places s i to s i + s - 1 of a cohort are stack i, and belong to process i modulo the number of
processes. Replies come in request order from a bounded window.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Any, Protocol

from fedllm.engines.loopback import ReceivedReply, Reply, receive
from fedllm.errors import RunError
from fedllm.events import Emit, EngineAdjusted, EngineStarted
from fedllm.messages import serialization
from fedllm.messages.call import Replies
from fedllm.messages.update import Failure, Request
from fedllm.rng import Key

AHEAD = 2  # stacks that a process has been asked for: one at work, one waiting
LOSSES = 3  # processes lost at work on the same stack, before its clients are given up


Answer = list[tuple[bytes, Mapping[str, int] | None]] | str  # replies, or what is wrong with the process


class WorkerGroup(Protocol):
    """Processes by place. `lost`: the exceptions that say that one is. `parameters`: of their base model."""

    workers: list[Any]
    parameters: int
    lost: tuple[type[Exception], ...]

    def ask(self, place: int, name: str, sent: Sequence[bytes]) -> Any:
        """A reference to an answer to come."""
        ...

    def answer(self, reference: Any) -> Answer:
        """Wait for it."""
        ...

    def replace(self, place: int) -> None:
        """Put another process in a place."""
        ...


@dataclass(eq=False)
class PendingStack:
    """A stack under way. `bound`: its clients were asked before in this round. `reason`: why they are given up."""

    name: str
    number: int
    place: int
    requests: Sequence[Request]
    sent: Sequence[bytes]
    bound: bool
    losses: int = 0
    reason: str = ""
    reference: Any = None


@dataclass(eq=False)
class Dispatcher:
    """Answers calls with the processes of a group. `talks`: sessions matter, as clients are asked more than once."""

    group: WorkerGroup
    stack: int
    talks: bool
    emit: Emit
    started: bool = False
    moment: tuple[int, Key] | None = None
    homes: dict[int, Any] = field(default_factory=dict)  # stack -> the process that has its clients' sessions

    def __call__(self, name: str, requests: Mapping[str, Request]) -> Replies:
        """Replies in request order.

        Raises:
            RunError: what is wrong with a process is wrong with the next one, too.
        """
        if not self.started:
            self.started = True
            self.emit(EngineStarted(len(self.group.workers), self.stack, None, self.group.parameters, None))
        todo = self._pending_stacks(name, requests)
        under_way = deque(islice(todo, AHEAD * len(self.group.workers)))
        while under_way:
            replies = self._replies(under_way)
            pending = under_way.popleft()
            for request, reply in zip(pending.requests, replies, strict=True):
                yield str(request.ctx.client), receive(name, request, ReceivedReply.of(reply, name, request), self.emit)
            under_way.extend(islice(todo, 1))

    def _pending_stacks(self, name: str, requests: Mapping[str, Request]) -> Iterator[PendingStack]:
        for number, asked in groupby(requests.values(), key=lambda request: request.ctx.slot // self.stack):
            part = list(asked)
            moment = (part[0].ctx.round, part[0].ctx.key)
            if moment != self.moment:
                self.moment, self.homes = moment, {}
            sent = [serialization.serialize(request) for request in part]
            bound = self.talks and number in self.homes
            pending = PendingStack(name, number, number % len(self.group.workers), part, sent, bound)
            self._send(pending)
            yield pending

    def _send(self, pending: PendingStack) -> None:
        worker = self.group.workers[pending.place]
        if pending.bound and self.homes[pending.number] is not worker:
            pending.reason = "its process was lost, and with it what it had agreed on in this round"
        if not pending.reason:
            self.homes[pending.number] = worker
            pending.reference = self.group.ask(pending.place, pending.name, pending.sent)

    def _replies(self, under_way: Sequence[PendingStack]) -> list[Reply]:
        """Those of the first stack under way. Whatever a lost process had been asked for is asked of the next one."""
        pending = under_way[0]
        while not pending.reason:
            try:
                found = self.group.answer(pending.reference)
            except self.group.lost as error:
                self._replaced(pending, str(error).partition("\n")[0].rstrip(". "))
                for other in under_way:
                    if other.place == pending.place:
                        self._send(other)
                continue
            if isinstance(found, str):
                raise RunError(found)
            return [Reply(*told, len(sent)) for told, sent in zip(found, pending.sent, strict=True)]
        failures = (Failure(str(r.ctx.client), r.ctx.round, pending.reason) for r in pending.requests)
        return [
            Reply(serialization.serialize(failure), None, len(sent))
            for failure, sent in zip(failures, pending.sent, strict=True)
        ]

    def _replaced(self, pending: PendingStack, why: str) -> None:
        # an actor works in the order in which it was asked: the first stack is the one that it worked on
        pending.losses += 1
        names = ", ".join(str(request.ctx.client) for request in pending.requests)
        text = f"a process was lost while it worked on {names} ({why}); another one takes its place"
        self.emit(EngineAdjusted(pending.requests[0].ctx.round, text))
        if pending.losses == LOSSES:
            pending.reason = f"{LOSSES} processes were lost while they worked on it ({why})"
        self.group.replace(pending.place)
