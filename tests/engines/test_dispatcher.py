"""Stacks on their way to other processes: to which, in which order, how many at once, and what a lost one costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch

from fedllm.engines.remote.dispatcher import AHEAD, LOSSES, Answer, Dispatcher
from fedllm.errors import RunError
from fedllm.events import EngineAdjusted, Event, MessageSent
from fedllm.messages import serialization
from fedllm.messages.context import RoundContext
from fedllm.messages.update import Failure, Part, Request, Update
from fedllm.rng import Key


class Lost(Exception):
    """A process has ended."""


@dataclass
class Process:
    """Answers "NAME CLIENT" to each client, in order. `deadly`: clients at which it ends, with how many after it."""

    deadly: dict[str, int]
    talked: set[str] = field(default_factory=set)
    ended: bool = False

    def take(self, name: str, clients: Sequence[str]) -> list[Answer | None]:
        """A cell that holds the answer; None where the process ended before."""
        for client in clients:
            if self.deadly.get(client, 0) and not self.ended:
                self.ended = True
                self.deadly[client] -= 1
        if self.ended:
            return [None]
        self.talked |= set(clients)
        return [[(serialization.serialize(update(f"{name} {client}")), {"delta": 8}) for client in clients]]


@dataclass
class Group:
    """Processes of this one, as a `WorkerGroup`."""

    deadly: dict[str, int] = field(default_factory=dict)
    workers: list[Process] = field(init=False)
    lost: tuple[type[Exception], ...] = (Lost,)
    parameters: int = 7
    asked: list[tuple[int, str, tuple[str, ...]]] = field(default_factory=list)
    open: int = 0
    most: int = 0

    def __post_init__(self) -> None:
        self.workers = [Process(self.deadly) for _ in range(2)]

    def ask(self, place: int, name: str, sent: Sequence[bytes]) -> list[Answer | None]:
        """Asked in this order."""
        requests = [serialization.deserialize(data) for data in sent]
        clients = tuple(str(request.ctx.client) for request in requests if isinstance(request, Request))
        self.asked.append((place, name, clients))
        self.open += 1
        self.most = max(self.most, self.open)
        return self.workers[place].take(name, clients)

    def answer(self, reference: list[Answer | None]) -> Answer:
        """What the process said."""
        self.open -= 1
        if reference[0] is None:
            raise Lost("it has ended\nand more")
        return reference[0]

    def replace(self, place: int) -> None:
        """Another one."""
        self.workers[place] = Process(self.deadly)


def update(text: str) -> Update:
    return Update({"delta": Part({text: torch.zeros(1)}, 1.0)})


def requests(clients: str, round: int = 0, key: int = 0) -> dict[str, Request]:
    ctx = RoundContext(round, Key(key), len(clients), len(clients))
    return {who: Request({}, (), replace(ctx, client=who, slot=slot)) for slot, who in enumerate(clients)}


def told(dispatcher: Dispatcher, name: str, asked: Mapping[str, Request]) -> list[tuple[str, str]]:
    """Each client's reply: the name of its leaf, or its failure's reason."""
    found = []
    for client, reply in dispatcher(name, asked):
        found.append((client, reply.reason if isinstance(reply, Failure) else next(iter(reply.parts["delta"].tree))))
    return found


def dispatcher_of(group: Group, *, stack: int = 1, talks: bool = False) -> tuple[Dispatcher, list[Event]]:
    events: list[Event] = []
    return Dispatcher(group, stack, talks, events.append), events


def works(clients: str) -> list[tuple[str, str]]:
    return [(who, f"work {who}") for who in clients]


def test_stacks_are_cut_in_cohort_order_and_dealt_out_in_turn() -> None:
    dispatcher, events = dispatcher_of(group := Group(), stack=2)
    assert told(dispatcher, "work", requests("abcde")) == works("abcde")
    assert group.asked == [(0, "work", ("a", "b")), (1, "work", ("c", "d")), (0, "work", ("e",))]
    assert [(e.client, e.direction) for e in events if isinstance(e, MessageSent)] == [
        (who, way) for who in "abcde" for way in ("down", "up")
    ]


def test_a_client_is_asked_where_it_was_asked_before() -> None:
    dispatcher, _ = dispatcher_of(group := Group(), stack=2, talks=True)
    everyone = requests("abcdef")
    told(dispatcher, "keys", everyone)
    told(dispatcher, "work", {who: everyone[who] for who in "bdf"})  # whoever is missing moves nobody
    assert [place for place, _, _ in group.asked] == [0, 1, 0] * 2


def test_only_so_many_stacks_are_under_way() -> None:
    dispatcher, _ = dispatcher_of(group := Group())
    assert len(told(dispatcher, "work", requests("abcdefghijklmnop"))) == 16
    assert group.most == AHEAD * 2


@pytest.mark.parametrize("losses", range(1, LOSSES))
def test_a_lost_process_is_replaced_and_asked_again(losses: int) -> None:
    dispatcher, events = dispatcher_of(group := Group({"c": losses}))
    assert told(dispatcher, "work", requests("abcdef")) == works("abcdef")
    notes = [event.text for event in events if isinstance(event, EngineAdjusted)]
    assert notes == ["a process was lost while it worked on c (it has ended); another one takes its place"] * losses
    assert group.asked.count((0, "work", ("c",))) == losses + 1
    assert group.asked.count((1, "work", ("d",))) == 1


def test_clients_that_cost_three_processes_are_given_up_and_no_others() -> None:
    dispatcher, events = dispatcher_of(group := Group({"c": 99}))
    reason = f"{LOSSES} processes were lost while they worked on it (it has ended)"
    assert told(dispatcher, "work", requests("abcdefg")) == [*works("ab"), ("c", reason), *works("defg")]
    assert sum(isinstance(event, EngineAdjusted) for event in events) == LOSSES
    assert group.asked.count((0, "work", ("c",))) == LOSSES


def test_what_clients_agreed_on_is_lost_with_their_process() -> None:
    dispatcher, _ = dispatcher_of(Group({"c": 0}), talks=True)
    everyone = requests("abcd")
    told(dispatcher, "keys", everyone)
    dispatcher.group.workers[0].deadly["c"] = 1
    found = dict(told(dispatcher, "work", everyone))
    assert {who for who, text in found.items() if text == f"work {who}"} == {"a", "b", "d"}
    assert "agreed on" in found["c"]
    later = dict(told(dispatcher, "unmask", {who: everyone[who] for who in "abd"}))
    assert "agreed on" in later["a"] and later["b"] == "unmask b" and later["d"] == "unmask d"


def test_the_first_question_of_a_round_is_asked_again_even_where_sessions_matter() -> None:
    dispatcher, _ = dispatcher_of(Group({"c": 1}), talks=True)
    everyone = requests("abcd")
    assert told(dispatcher, "keys", everyone) == [(who, f"keys {who}") for who in "abcd"]
    assert dict(told(dispatcher, "work", everyone))["c"] == "work c"
    assert told(dispatcher, "keys", requests("abcd", round=1)) == [(who, f"keys {who}") for who in "abcd"]


def test_what_is_wrong_with_a_process_ends_the_run() -> None:
    dispatcher, _ = dispatcher_of(group := Group())
    group.ask = lambda place, name, sent: ["the disk is full"]  # type: ignore[method-assign, assignment]
    with pytest.raises(RunError, match="the disk is full"):
        told(dispatcher, "work", requests("ab"))
