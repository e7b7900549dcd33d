"""Whose memory a stack takes: that of the stack before it on its thread, where the thread keeps such."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fedllm.engines.batched.engine import Batched
from fedllm.messages.context import RoundContext
from fedllm.runs import server_round
from fedllm.training import client_stack
from fedllm.training.client_stack import BufferLayout, give_back, keep_buffers
from tests.engines.cohort import CLIENTS, begun, experiment, write_records

LARGE = 5 << 20  # values of a client: two are 40 MiB in float32


def layout(size: int, dtype: torch.dtype = torch.float32) -> BufferLayout:
    return BufferLayout.of([{"a": torch.ones(size, dtype=dtype)}])


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def again(place: BufferLayout, clients: int = 2) -> bool:
    """Whether a second stack has the memory of the first, which was full of ones; it is full of zeros."""
    first = place.zeros(clients)
    memory = first.fill_(1).data_ptr()
    give_back(first)
    del first
    held = [buffer.data_ptr() for buffer in client_stack._kept.buffers]
    second = place.zeros(clients)
    assert not second.any() and not client_stack._kept.buffers
    return held == [memory] and second.data_ptr() == memory


def test_a_large_buffer_is_taken_again_and_is_zero(thread: ThreadPoolExecutor) -> None:
    thread.submit(keep_buffers).result()
    assert thread.submit(again, layout(LARGE)).result()
    assert not thread.submit(again, layout(LARGE // 2)).result()  # the heap keeps it


def test_a_thread_that_is_not_asked_to_keeps_none(thread: ThreadPoolExecutor) -> None:
    assert not thread.submit(again, layout(LARGE)).result()
    assert not again(layout(LARGE))


def test_only_the_same_shape_and_type_and_thread_has_it(thread: ThreadPoolExecutor) -> None:
    thread.submit(keep_buffers).result()

    def kept() -> int:
        return len(client_stack._kept.buffers)

    thread.submit(lambda: give_back(layout(LARGE).zeros(2), layout(LARGE).zeros(3))).result()
    assert thread.submit(kept).result() == 2 and kept() == 0
    for other in (layout(LARGE + 16), layout(LARGE, torch.float64), layout(LARGE // 2)):
        thread.submit(lambda place=other: place.zeros(2)).result()
        assert thread.submit(kept).result() == 2
    thread.submit(lambda: layout(LARGE).zeros(3)).result()
    assert thread.submit(kept).result() == 1
    thread.submit(give_back).result()
    assert thread.submit(kept).result() == 0


@pytest.mark.parametrize(("budget", "keeps"), [(None, True), ("1GB", False)])
def test_workers_keep_them_where_memory_is_not_scarce(
    budget: str | None, keeps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    plain = give_back
    monkeypatch.setattr(
        "fedllm.training.gradient_descent.give_back",
        lambda *buffers: seen.append(client_stack._kept.keeps) or plain(*buffers),
    )
    made = experiment(write_records(tmp_path / "people.jsonl"))
    asked = server_round.requests_for(
        made, server_round.initial_state(made, begun(made)), CLIENTS, RoundContext(0, made.key, 5, 5, 2)
    )
    with Batched(stack=2, workers=1, memory_budget=budget).open(made, None, lambda event: None) as call:
        assert len(list(call("work", asked))) == len(CLIENTS)
    assert set(seen) == {keeps}
