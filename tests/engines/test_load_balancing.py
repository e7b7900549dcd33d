"""Stacks with as much to do each, whatever the workers."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.engines.batched.engine import Batched
from fedllm.engines.batched.load_balancing import Schedule, balance, divide, stack_size
from fedllm.engines.client import Site
from fedllm.errors import ClientError
from fedllm.messages.context import Profile, RoundContext
from fedllm.messages.update import Update
from fedllm.rng import Key
from fedllm.training.sgd import Sgd
from tests.engines.cohort import CLIENTS, Own, experiment, sent, write_long, write_records

LOADS = st.lists(st.integers(0, 10**6), max_size=40)


@given(LOADS, st.integers(1, 9), st.integers(0, 4))
def test_everyone_once_in_stacks_that_are_not_too_large(loads: list[int], size: int, more: int) -> None:
    fewest = -(-len(loads) // size) + more
    stacks = balance(loads, size, fewest)
    assert sorted(place for stack in stacks for place in stack) == list(range(len(loads)))
    assert all(0 < len(stack) <= size and stack == sorted(stack) for stack in stacks)
    assert len(stacks) == min(fewest, len(loads))
    sums = [sum(loads[place] for place in stack) for stack in stacks]
    assert sums == sorted(sums, reverse=True)


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=2), st.integers(1, 4))
def test_two_stacks_differ_by_one_client_at_most(pair: list[int], size: int) -> None:
    """The greedy bound: before the last client was dealt to it, the fuller stack was the emptier one."""
    loads = pair * size
    first, second = (sum(loads[place] for place in stack) for stack in balance(loads, len(loads), 2))
    assert first - second <= max(loads)


@pytest.mark.parametrize(
    ("clients", "size", "workers", "lengths"),
    [
        (4, 4, None, [4]),
        (1, 4, None, [1]),
        (9, 4, None, [2, 2, 2, 3]),  # four stacks and not three: two workers end together
        (20, 4, None, [4, 4, 4, 4, 4]),
        (0, 4, None, []),
        (4, 4, 1, [4]),
        (9, 4, 1, [3, 3, 3]),
        (1, 4, 2, [1]),
        (4, 4, 2, [2, 2]),
        (8, 4, 2, [4, 4]),
        (9, 4, 2, [2, 2, 2, 3]),  # two stacks for each worker
        (16, 4, 2, [4, 4, 4, 4]),
        (20, 4, 2, [3, 3, 3, 3, 4, 4]),
        (3, 4, 4, [1, 1, 1]),
        (9, 4, 4, [2, 2, 2, 3]),
        (36, 4, 8, [2] * 12 + [3] * 4),
        (100, 4, 32, [3] * 28 + [4] * 4),
        (0, 4, 4, []),
    ],
)
def test_as_many_stacks_for_each_worker(clients: int, size: int, workers: int | None, lengths: list[int]) -> None:
    """By hand: with workers the fewest multiple of their number that holds all; without, powers of two of batches."""
    batches = divide(clients, size, workers)
    assert sum(part for part, _ in batches) == clients
    assert sorted(len(s) for part, count in batches for s in balance([7] * part, size, count)) == lengths


@given(st.integers(0, 200), st.integers(1, 9), st.integers(1, 40))
def test_no_stack_is_too_large_and_no_worker_without_one(clients: int, size: int, workers: int) -> None:
    batches = divide(clients, size, workers)
    assert sum(part for part, _ in batches) == clients
    assert all(0 < count <= part <= count * size for part, count in batches)
    stacks = sum(count for _, count in batches)
    assert stacks == clients or stacks % workers == 0
    assert all(count % workers == 0 or stacks == clients for _, count in batches)


@pytest.mark.parametrize(
    ("workers", "busy", "threads", "clients", "found"),
    [
        (2, 2, None, 1, (2, 0)),  # one client alone has both cores
        (2, 2, None, 2, (1, 0)),
        (4, 4, None, 1, (4, 0)),
        (4, 4, None, 3, (1, 1)),  # the fullest stack has the fourth
        (32, 32, None, 5, (6, 2)),
        (4, None, None, 3, (4, 0)),  # a stack of all three
        (4, 4, None, 9, (1, 0)),
        (4, 4, 1, 1, (1, 0)),
        (4, 4, 2, 9, (2, 0)),
        (4, 4, None, 0, (1, 0)),
    ],
)
def test_no_core_is_idle(workers: int, busy: int | None, threads: int | None, clients: int, found: tuple[int]) -> None:
    """Threads of each stack, and the stacks that have one more."""
    schedule = Schedule(workers, 4, busy, threads)
    assert schedule.threads_of(clients) == found
    if threads is None and 0 < clients <= workers and busy:
        assert found[0] * clients + found[1] == workers


def test_by_hand() -> None:
    """9 + 6 + 5 against 8 + 7 + 1; then 9 and 7 change places, and both have 18."""
    assert balance([5, 9, 1, 7, 6, 8], 3, 2) == [[0, 3, 4], [1, 2, 5]]


@pytest.mark.parametrize(
    ("tokens", "size"),
    [(0.0, 4), (1, 16), (20, 16), (32, 16), (33, 15), (64, 8), (85.5, 5), (102.4, 5), (102.5, 4), (163, 4), (1e6, 4)],
)
def test_short_batches_make_large_stacks(tokens: float, size: int) -> None:
    """The whole part of 512 over the tokens, from 4 to 16."""
    assert stack_size(tokens) == size


def test_the_mean_is_that_of_the_first_rounds_micro_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ann: no step. ben: 3 steps of 2 micro-batches with one sequence of 40 tokens. cid: one step of 2 with 3 each."""
    own = (("ann", "steps", 0), ("ben", "steps", 3), ("cid", "steps", 1), ("cid", "batch_size", 3))
    work = Own(lr=0.1, steps=2, batch_size=1, accumulation=2, max_length=40, own=own)
    site = Site.of(experiment(write_long(tmp_path / "people.jsonl"), work=work), None)
    means = [site.batch_tokens(clients) for clients in (["ann"], [], ["ben"], ["cid"], ["ann", "ben", "cid"])]
    assert means == [0, 0, 40, 120, (6 * 40 + 2 * 120) / 8]

    def lost(client: str) -> None:
        raise ClientError("its file is gone")

    monkeypatch.setattr(site, "examples", lost)
    assert site.batch_tokens(["ben", "cid"]) == 0


def test_loads_are_the_tokens_that_the_round_trains_on(tmp_path: Path) -> None:
    path = write_records(tmp_path / "people.jsonl")
    made = experiment(path, work=Sgd(lr=0.1, steps=3, batch_size=2))
    site, found = Site.of(made, None), sent(Batched(stack=2, workers=1), made)
    assert len(found) == 2 * len(CLIENTS)
    for (round, client), reply in found.items():
        assert isinstance(reply, Update)
        ctx = RoundContext(round, made.key, 5, 5, 2, client=client)
        assert site.tokens(ctx) == int(reply.parts["counts"].tree["tokens"]) > 0
    assert site.tokens(RoundContext(0, Key(0), 1, 1, client=CLIENTS[0], profile=Profile(steps=0))) == 0


def test_a_client_whose_data_cannot_be_had_weighs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = experiment(write_records(tmp_path / "people.jsonl"))
    site, ctx = Site.of(made, None), RoundContext(0, made.key, 1, 1, client=CLIENTS[0])
    assert site.tokens(ctx) > 0

    def lost(client: str) -> None:
        raise ClientError("its file is gone")

    monkeypatch.setattr(site, "examples", lost)
    assert site.tokens(ctx) == 0
