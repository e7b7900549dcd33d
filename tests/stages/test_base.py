"""The five folds: order, pairing by position, and what a stage may see."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from fedllm.messages.context import ClientContext, RoundContext
from fedllm.messages.traits import Bracket, Traits
from fedllm.messages.update import Part, Update
from fedllm.rng import Key
from fedllm.stages.base import Stage
from fedllm.stages.round_trip import Received, adjust_grads, broadcast_all, decode_all, encode_all, receive_all
from fedllm.tensors.tree import Tree

CTX = RoundContext(round=2, key=Key(0), cohort=1, population=1)
LOCAL = ClientContext(CTX, {"examples": 3.0})
Line = tuple[str, str, list[str]]


def value(number: float) -> Tree:
    return {"w": torch.tensor(number)}


def number(leaves: Tree) -> float:
    return float(leaves["w"])


@dataclass(frozen=True)
class Recorder(Stage):
    """Writes down what each hook gets; appends its digit to a number so that the order of folds shows."""

    digit: int
    log: list[Line] = field(default_factory=list, compare=False)

    def note(self, hook: str, *given: Tree) -> None:
        self.log.append((hook, str(self.digit), [" ".join(f"{k}={float(v):g}" for k, v in t.items()) for t in given]))

    def then(self, leaves: Tree) -> Tree:
        return {name: 10 * leaf + self.digit for name, leaf in leaves.items()}

    def broadcast(self, params: Tree, state: Tree, ctx: RoundContext) -> tuple[Tree, Tree]:
        self.note("broadcast", params, state)
        return self.then(params), {"extra": torch.tensor(self.digit)}

    def receive(self, params: Tree, extra: Tree, memory: Tree, local: ClientContext) -> tuple[Tree, Tree]:
        self.note("receive", params, extra, memory)
        return self.then(params), {"scratch": torch.tensor(self.digit)}

    def grads(self, grads: Tree, params: Tree, scratch: Tree) -> Tree:
        self.note("grads", grads, params, scratch)
        return self.then(grads)

    def encode(self, update: Update, scratch: Tree, memory: Tree, local: ClientContext) -> tuple[Update, Tree]:
        self.note("encode", update.parts["delta"].tree, scratch, memory)
        kept = {"memory": memory["memory"] + 100}
        return update.having("delta", Part(self.then(update.parts["delta"].tree))), kept

    def decode(self, total: Update, params: Tree, state: Tree, ctx: RoundContext) -> tuple[Update, Tree]:
        self.note("decode", total.parts["delta"].tree, params, state)
        return total.having("delta", Part(self.then(total.parts["delta"].tree))), {"state": state["state"] + 100}


def recorders() -> tuple[tuple[Recorder, ...], list[Line]]:
    log: list[Line] = []
    return tuple(Recorder(digit, log) for digit in (1, 2, 3)), log


def held(name: str) -> tuple[Tree, ...]:
    return tuple({name: torch.tensor(float(digit))} for digit in (1, 2, 3))


def test_broadcast_runs_in_order() -> None:
    stages, log = recorders()
    params, extras = broadcast_all(stages, value(7), held("state"), CTX)
    assert number(params) == 7123
    assert [float(extra["extra"]) for extra in extras] == [1, 2, 3]
    assert log == [
        ("broadcast", "1", ["w=7", "state=1"]),
        ("broadcast", "2", ["w=71", "state=2"]),
        ("broadcast", "3", ["w=712", "state=3"]),
    ]


def test_receive_runs_in_reverse_order_and_scratch_stands_where_its_stage_stands() -> None:
    stages, log = recorders()
    params, arrival = receive_all(stages, value(7), held("extra"), held("memory"), LOCAL)
    assert number(params) == 7321
    assert [float(scratch["scratch"]) for scratch in arrival.scratch] == [1, 2, 3]
    assert log == [
        ("receive", "3", ["w=7", "extra=3", "memory=3"]),
        ("receive", "2", ["w=73", "extra=2", "memory=2"]),
        ("receive", "1", ["w=732", "extra=1", "memory=1"]),
    ]


def test_grads_run_in_order_with_their_own_scratch() -> None:
    stages, log = recorders()
    arrival = Received(held("scratch"), (frozenset({"w"}),) * 3)
    assert number(adjust_grads(stages, arrival, value(7), value(5))) == 7123
    assert log == [
        ("grads", "1", ["w=7", "w=5", "scratch=1"]),
        ("grads", "2", ["w=71", "w=5", "scratch=2"]),
        ("grads", "3", ["w=712", "w=5", "scratch=3"]),
    ]


def test_encode_runs_in_order_and_memories_stand_where_their_stage_stands() -> None:
    stages, log = recorders()
    arrival = Received(held("scratch"), (frozenset(),) * 3)
    update, memories = encode_all(stages, Update({"delta": Part(value(7))}), arrival, held("memory"), LOCAL)
    assert number(update.parts["delta"].tree) == 7123
    assert [float(memory["memory"]) for memory in memories] == [101, 102, 103]
    assert log == [
        ("encode", "1", ["w=7", "scratch=1", "memory=1"]),
        ("encode", "2", ["w=71", "scratch=2", "memory=2"]),
        ("encode", "3", ["w=712", "scratch=3", "memory=3"]),
    ]


def test_decode_runs_in_reverse_order_and_states_stand_where_their_stage_stands() -> None:
    stages, log = recorders()
    total, states = decode_all(stages, Update({"delta": Part(value(7))}), value(5), held("state"), CTX)
    assert number(total.parts["delta"].tree) == 7321
    assert [float(state["state"]) for state in states] == [101, 102, 103]
    assert log == [
        ("decode", "3", ["w=7", "w=5", "state=3"]),
        ("decode", "2", ["w=73", "w=5", "state=2"]),
        ("decode", "1", ["w=732", "w=5", "state=1"]),
    ]


@dataclass(frozen=True)
class Adds(Stage):
    """Puts a leaf of its own in, as a stage that keeps leaves on the client does."""

    name: str

    def receive(self, params: Tree, extra: Tree, memory: Tree, local: ClientContext) -> tuple[Tree, Tree]:
        return {**params, self.name: torch.tensor(0.0)}, {}


@dataclass(frozen=True)
class Doubles(Stage):
    """Doubles the gradients that it sees, and writes down which they are, and which parameters."""

    seen: list[set[str]] = field(default_factory=list, compare=False)

    def grads(self, grads: Tree, params: Tree, scratch: Tree) -> Tree:
        self.seen.extend((set(grads), set(params)))
        return {name: 2 * grad for name, grad in grads.items()}


def test_grads_see_only_what_passed_their_receive() -> None:
    """A stage that stands first receives last: what it puts in is its own, and no stage behind it sees that."""
    before, after = Doubles(), Doubles()
    stages = (before, Adds("own"), after)
    params, arrival = receive_all(stages, value(1), ({},) * 3, ({},) * 3, LOCAL)
    assert set(params) == {"w", "own"}
    assert arrival.names == (frozenset({"w", "own"}), frozenset({"w", "own"}), frozenset({"w"}))
    ones = {name: torch.tensor(1.0) for name in ("w", "own", "never sent")}
    found = adjust_grads(stages, arrival, ones, ones)
    assert {name: float(grad) for name, grad in found.items()} == {"w": 4, "own": 2, "never sent": 1}
    assert before.seen == [{"w", "own"}] * 2 and after.seen == [{"w"}] * 2
    assert all(float(grad) == 1 for grad in ones.values())


def test_grads_that_do_nothing_cost_nothing() -> None:
    grads = value(1)
    arrival = Received(({},), (frozenset({"w"}),))
    assert adjust_grads((Stage(),), arrival, grads, value(1)) is grads


def test_each_hook_is_the_identity() -> None:
    params, memory, state, update = value(1), value(2), value(3), Update({"delta": Part(value(4))})
    sent, extras = broadcast_all((Stage(),), params, (state,), CTX)
    assert sent is params and extras == ({},)
    start, arrival = receive_all((Stage(),), sent, extras, (memory,), LOCAL)
    assert start is params and arrival == Received(({},), (frozenset({"w"}),))
    made, memories = encode_all((Stage(),), update, arrival, (memory,), LOCAL)
    assert made is update and memories[0] is memory
    total, states = decode_all((Stage(),), update, params, (state,), CTX)
    assert total is update and states[0] is state
    assert broadcast_all((), params, (), CTX) == (params, ()) and decode_all((), update, params, (), CTX) == (
        update,
        (),
    )


def test_a_missing_state_or_extra_is_not_passed_over() -> None:
    stages, _ = recorders()
    with pytest.raises(ValueError):
        broadcast_all(stages, value(1), held("state")[:2], CTX)
    with pytest.raises(ValueError):
        receive_all(stages, value(1), held("extra")[:2], held("memory"), LOCAL)
    with pytest.raises(ValueError):
        decode_all(stages, Update({}), value(1), (*held("state"), {}), CTX)


def test_defaults_promise_nothing() -> None:
    traits = Stage().traits
    assert traits == Traits() and traits.bracket is Bracket.MEANING and not traits.takes and not traits.makes
    assert not traits.needs | traits.gives | traits.keeps | traits.loses
    assert traits.adapter is None and traits.optimizers is None
    ordered = [bracket.name for bracket in sorted(Bracket)]
    assert ordered == ["LOCAL", "MEANING", "WEIGH", "PRIVATE", "ADVERSARY", "WIRE"]
