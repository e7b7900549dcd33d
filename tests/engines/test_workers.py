"""Stacks within a budget: fewer at once, less kept, halves, and in the end a sentence with a number."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fedllm.engines.batched import workers
from fedllm.engines.batched.engine import Batched
from fedllm.engines.batched.memory import MemoryEstimate
from fedllm.engines.client import Site
from fedllm.engines.torch_threads import one_thread
from fedllm.errors import RunError
from fedllm.events import EngineAdjusted, Event
from fedllm.messages.update import Failure, Update
from fedllm.models.adapters.lora import Lora
from fedllm.models.adapters.soft_prompt import SoftPrompt
from fedllm.stages.client_drift.prox import Prox
from fedllm.stages.compression.top_k import TopK
from fedllm.stages.weighting.uniform import Uniform
from fedllm.training.sgd import Sgd
from tests.engines.cohort import CLIENTS, experiment, same, sent, write_records

WORK = Sgd(lr=0.05, steps=2, batch_size=4, max_length=200, momentum=0.9)
ADAPTERS = {"lora": Lora(rank=1), "dropout": Lora(rank=1, dropout=0.3), "soft": SoftPrompt(tokens=3)}
Found = Mapping[tuple[int, str], Update | Failure]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Longer records: what a pass keeps is more than what the adapters take."""
    path = write_records(tmp_path_factory.mktemp("data") / "people.jsonl")
    path.write_text(path.read_text(encoding="utf-8").replace('"ab', '"' + "xyz " * 25 + "ab"), encoding="utf-8")
    return path


class Room:
    """Needs of the stacks of an experiment in bytes, over both rounds."""

    def __init__(self, made: Any) -> None:
        with one_thread():
            self.site = Site.of(made, None)
            self.costs = MemoryEstimate.measured(self.site.model, self.site.fresh)
        self.work = made.work

    def largest(self, size: int, *, recompute: bool) -> int:
        jobs = [self.site.first_job(client) for client in CLIENTS]
        stacks = [jobs[at : at + size] for at in range(0, len(jobs), size)]
        return max(self.costs.of(self.work, stack, recompute=recompute) for stack in stacks)


@pytest.fixture(scope="module", params=list(ADAPTERS))
def made(request: pytest.FixtureRequest, data: Path) -> Any:
    stages = (Prox(0.1), TopK(0.5), Uniform())
    return experiment(data, adapter=ADAPTERS[request.param], dtype="float32", work=WORK, stages=stages)


@pytest.fixture(scope="module")
def room(made: Any) -> Room:
    return Room(made)


@pytest.fixture(scope="module")
def free(made: Any) -> Found:
    """Stacks of two, with all the memory there is."""
    return trained(made, None)[0]


def trained(
    made: Any, budget: int | None, stack: int = 2, workers: int = 2, cohort: Sequence[str] = CLIENTS
) -> tuple[Found, list[str]]:
    told: list[Event] = []
    limit = None if budget is None else str(budget)
    found = sent(Batched(stack=stack, workers=workers, memory_budget=limit), made, told=told, cohort=cohort)
    return found, [event.text for event in told if isinstance(event, EngineAdjusted)]


def all_same(found: Found, expected: Found) -> bool:
    assert not any(isinstance(reply, Failure) for reply in expected.values())
    return list(found) == list(expected) and all(same(found[key], expected[key]) for key in expected)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The most stacks that trained at the same time."""
    inside, most, lock, real = [0], [0], threading.Lock(), workers.run_phases

    def counted(*args: Any) -> Any:
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        try:
            return real(*args)
        finally:
            with lock:
                inside[0] -= 1

    monkeypatch.setattr(workers, "run_phases", counted)
    return most


def test_two_stacks_that_fit_train_at_the_same_time(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits for the other: with one at a time the barrier would break."""
    both, real = threading.Barrier(2, timeout=120), workers.run_phases

    def together(*args: Any) -> Any:
        both.wait()
        return real(*args)

    monkeypatch.setattr(workers, "run_phases", together)
    found = sent(Batched(stack=2, workers=2), experiment(data, work=WORK), cohort=CLIENTS[:4])
    assert len(found) == 8 and not both.broken


def test_one_after_another(made: Any, room: Room, at_once: list[int]) -> None:
    """Two stacks of two, of which the smaller takes more than half of the larger one."""
    free, _ = trained(made, None, cohort=CLIENTS[:4])
    at_once[0] = 0
    found, notes = trained(made, int(1.1 * room.largest(2, recompute=False)), cohort=CLIENTS[:4])
    assert at_once == [1] and notes == []
    assert all_same(found, free)


def test_layers_computed_twice(made: Any, room: Room, free: Found) -> None:
    less, whole = room.largest(2, recompute=True), room.largest(2, recompute=False)
    assert less < 0.8 * whole
    found, notes = trained(made, int(1.05 * less))
    assert notes and all(note.endswith(": its layers are computed twice") for note in notes)
    assert all(re.match(r"the stack of \w+, \w+ would take \d+\.\d{3}GB: ", note) for note in notes)
    assert all_same(found, free)


def test_halves(made: Any, room: Room) -> None:
    """A stack of four in halves is two stacks of two."""
    budget = int(1.05 * room.largest(2, recompute=True))
    assert budget < room.largest(4, recompute=True)
    found, notes = trained(made, budget, stack=4, cohort=CLIENTS[:4])
    assert any(re.fullmatch(r"the stack of ann, ben, cid, dot does not fit .*: it is cut in halves", n) for n in notes)
    halves = [trained(made, None, stack=2, cohort=pair)[0] for pair in (CLIENTS[:2], CLIENTS[2:4])]
    first_round = {key: reply for half in halves for key, reply in half.items() if key[0] == 0}
    assert len(first_round) == 4 and all_same({key: found[key] for key in first_round}, first_round)


def test_below_one_client_names_a_budget_that_works(made: Any, room: Room) -> None:
    with pytest.raises(RunError) as caught:
        trained(made, room.largest(1, recompute=True) // 2)
    told = re.fullmatch(
        r"client (\w+) needs (\d+\.\d{3}GB) of memory for one local step, and the budget is \d+\.\d{3}GB; raise "
        r"engine.batched.memory_budget to (\S+), or lower the work's batch_size or max_length",
        str(caught.value),
    )
    assert told is not None and told[1] in CLIENTS and told[2] == told[3]
    found = sent(Batched(stack=2, workers=2, memory_budget=told[3]), made)
    assert all(isinstance(reply, Update) for reply in found.values())


def raises(error: BaseException, times: int, monkeypatch: pytest.MonkeyPatch) -> list[Sequence[Any]]:
    """The first attempts run out of memory, after a step. What was attempted: clients, and with recomputation?"""
    tried: list[Sequence[Any]] = []
    real = workers.run_phases

    def failing(work: Any, jobs: Any, model: Any, how: Any) -> Any:
        tried.append(([job.ctx.client for job in jobs], how.recompute))
        if len(tried) <= times:
            real(Sgd(**{**work.__dict__, "steps": 1}), jobs, model, how)
            raise error
        return real(work, jobs, model, how)

    monkeypatch.setattr(workers, "run_phases", failing)
    return tried


ERRORS: Mapping[str, Callable[[], BaseException]] = {
    "gpu": lambda: torch.OutOfMemoryError("CUDA out of memory"),
    "python": MemoryError,
    "torch": lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_memory_that_runs_out_repeats_the_stack_from_its_start(
    made: Any, free: Found, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    tried = raises(ERRORS[kind](), 1, monkeypatch)
    found, notes = trained(made, None, workers=1)
    first = tried[0][0]  # which two are dealt together depends on what their sequences have in common
    assert len(first) == 2 and tried[:2] == [(first, False), (first, False)]
    assert notes == [f"memory ran out in the stack of {', '.join(first)}: it is repeated from its start"]
    assert all_same(found, free)


def test_memory_that_runs_out_again_and_again(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = experiment(data, adapter=ADAPTERS["dropout"], dtype="float32", work=WORK)
    free, _ = trained(made, None, stack=1)
    tried = raises(MemoryError(), 3, monkeypatch)
    found, notes = trained(made, None, workers=1)
    pair = ["ann", "ben"]
    assert tried[:5] == [(pair, False), (pair, False), (pair, True), (["ann"], False), (["ben"], False)]
    assert len(notes) == 4 and notes[-1].endswith("it is cut in halves")
    assert all(same(found[0, client], free[0, client]) for client in ("ann", "ben"))


def test_other_errors_are_no_lack_of_memory(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raises(RuntimeError("shapes do not fit"), 1, monkeypatch)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        trained(experiment(data, work=WORK), None)
