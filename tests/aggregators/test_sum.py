"""The sum: against a textbook mean, in constant memory, and without touching what others hold."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedllm.aggregators.base import Aggregator, ClientSession
from fedllm.aggregators.sum import Sum
from fedllm.errors import ClientError
from fedllm.messages.call import Call
from fedllm.messages.context import ClientContext, RoundContext
from fedllm.messages.traits import Fact, Traits
from fedllm.messages.update import Failure, Part, Request, Update
from fedllm.rng import Key
from fedllm.stages.round_trip import Received, decode_all, encode_all
from fedllm.stages.weighting.by_examples import ByExamples

CTX = RoundContext(round=0, key=Key(0), cohort=3, population=3)


def requests(number: int) -> dict[str, Request]:
    return {f"client-{k}": Request({}, (), CTX) for k in range(number)}


def answering(replies: Sequence[Update | Failure], calls: list[str] | None = None) -> Call:
    """A call whose replies are given, in the order of the requests."""

    def call(name: str, asked: Mapping[str, Request]) -> Iterator[tuple[str, Update | Failure]]:
        if calls is not None:
            calls.append(name)
        yield from zip(asked, replies, strict=True)

    return call


def total_of(*replies: Update | Failure) -> Update:
    return Sum().reduce(answering(replies), requests(len(replies)))


def delta(*values: float, weight: float | None = 1.0) -> Update:
    return Update({"delta": Part({"w": torch.tensor(values, dtype=torch.float64)}, weight)})


VALUES = st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=3)


@given(st.lists(st.tuples(st.integers(1, 1000), VALUES, st.booleans()), min_size=1, max_size=6))
def test_sum_and_by_examples_make_the_weighted_mean(clients: list[tuple[int, list[float], bool]]) -> None:
    stages, nothing = (ByExamples(),), Received(({},), (frozenset(),))
    replies: list[Update | Failure] = []
    top, bottom = [0.0] * 3, 0
    for number, values, lost in clients:
        local = ClientContext(CTX, {"examples": float(number)})
        sent, _ = encode_all(stages, delta(*values, weight=None), nothing, ({},), local)
        replies.append(Failure("c", 0, "gone") if lost else sent)
        if not lost:  # sum n_k x_k / sum n_k, over those who answered
            top, bottom = [a + number * x for a, x in zip(top, values, strict=True)], bottom + number
    total = total_of(*replies)
    if not bottom:
        assert total == Update({})
        return
    mean, _ = decode_all(stages, total, {}, ({},), CTX)
    expected = torch.tensor(top, dtype=torch.float64) / bottom
    torch.testing.assert_close(mean.parts["delta"].tree["w"], expected, rtol=1e-13, atol=1e-10)
    assert total.parts["delta"].weight == bottom


def test_one_call_of_the_name_that_is_asked_for() -> None:
    calls: list[str] = []
    call = answering([delta(1.0)], calls)
    Sum().reduce(call, requests(1))
    Sum().reduce(call, requests(1), "evaluate")
    assert calls == ["work", "evaluate"]


def test_nobody_answered() -> None:
    assert total_of() == Update({})
    assert total_of(Failure("a", 0, "gone"), Failure("b", 0, "gone")) == Update({})


def test_integers_stay_integers_to_the_bit() -> None:
    big = 2**53  # above it float64 skips every second integer
    numbers = [big + 1, big + 3, -(2**40)]
    parts = [Update({"n": Part({"n": torch.tensor([n])}, 0.0)}) for n in numbers]
    total = total_of(*parts).parts["n"].tree["n"]
    assert total.dtype == torch.int64 and total.item() == sum(numbers)
    wrapped = total_of(*[Update({"n": Part({"n": torch.tensor(2**62)}, 0.0)})] * 4).parts["n"].tree["n"]
    assert wrapped.item() == 0  # int64 adds modulo 2^64, which masks rely on


def test_parts_are_added_over_those_who_sent_them() -> None:
    more = delta(1.0).having("control", Part({"c": torch.tensor([5.0])}, 0.0))
    total = total_of(delta(10.0), more, delta(100.0, weight=3.0), more)
    assert total.parts["delta"].tree["w"].tolist() == [112.0] and total.parts["delta"].weight == 6.0
    assert total.parts["control"].tree["c"].tolist() == [10.0] and total.parts["control"].weight == 0.0


def test_replies_are_added_in_their_order() -> None:
    values = [1e16, 1.0, -1e16, 1.0]
    expected = ((1e16 + 1.0) - 1e16) + 1.0
    assert expected != sum(sorted(values))
    assert total_of(*map(delta, values)).parts["delta"].tree["w"].tolist() == [expected]


def test_the_first_reply_becomes_the_total_and_the_others_are_not_written_to() -> None:
    replies = [delta(float(number)) for number in range(1, 4)]
    total = total_of(*replies)
    assert total.parts["delta"].tree["w"] is replies[0].parts["delta"].tree["w"]
    assert [reply.parts["delta"].tree["w"].item() for reply in replies] == [6.0, 2.0, 3.0]


def test_memory_does_not_grow_with_the_cohort() -> None:
    """Counts the leaves that are alive while the replies come in."""
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most: dict[int, int] = {}

    def call(name: str, asked: Mapping[str, Request]) -> Iterator[tuple[str, Update | Failure]]:
        for client in asked:
            leaf = torch.ones(4)
            alive.add(leaf)
            most[len(asked)] = max(most.get(len(asked), 0), len(alive))
            yield client, Update({"delta": Part({"w": leaf}, 1.0)})
            del leaf

    for number in (3, 30):
        total = Sum().reduce(call, requests(number))
        assert total.parts["delta"].tree["w"].tolist() == [number] * 4
        del total
    assert most[3] == most[30] <= 2  # the one that is added, and the next


@pytest.mark.parametrize(
    "other",
    [
        {"v": torch.zeros(2, dtype=torch.float64)},
        {},
        {"w": torch.zeros(2, dtype=torch.float64), "v": torch.zeros(1)},
        {"w": torch.zeros(1, dtype=torch.float64)},  # would be spread over both entries
        {"w": torch.zeros((), dtype=torch.float64)},
        {"w": torch.zeros(2)},
        {"w": torch.zeros(2, dtype=torch.int64)},
    ],
)
def test_a_reply_that_does_not_fit_names_its_client(other: dict[str, Tensor]) -> None:
    with pytest.raises(ClientError, match=r"client-1, part 'delta' has other tensors"):
        total_of(delta(1.0, 2.0), Update({"delta": Part(other, 1.0)}))


def test_a_part_without_a_weight_is_refused() -> None:
    with pytest.raises(ClientError, match=r"client-0, part 'delta' has no weight"):
        total_of(delta(1.0, weight=None))


def test_defaults_of_an_aggregator() -> None:
    plain, update = Aggregator(), delta(1.0)
    assert plain.handlers() == {} and plain.seal(update, ClientSession(CTX)) is update
    with pytest.raises(NotImplementedError):
        plain.reduce(answering([]), {})
    assert Sum().traits == Traits(loses=Fact.HIDDEN)
