"""Calls to the batched engine: order, window, losses, evaluation, events, masks, Ctrl-C in the middle of a stack."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import fedllm
from fedllm.aggregators.secure_sum import SecureSum
from fedllm.data.partitioners.by import By
from fedllm.data.shards import ClientOutage
from fedllm.engines.batched.engine import Batched
from fedllm.engines.batched.load_balancing import BATCH_OF_STACKS
from fedllm.engines.serial import Serial
from fedllm.evaluation.settings import Evaluation
from fedllm.events import (
    ClientFailed,
    EngineChosen,
    EngineStarted,
    Evaluated,
    Event,
    MemoryMeasured,
    MessageSent,
    RoundFinished,
)
from fedllm.messages.context import RoundContext
from fedllm.messages.update import Failure, Request, Update
from fedllm.rng import Key
from fedllm.runs import server_round
from fedllm.runs.launch import Interrupted
from fedllm.stages.client_drift.prox import Prox
from fedllm.stages.compression.top_k import TopK
from fedllm.stages.privacy.fixed_point import FixedPoint
from fedllm.stages.weighting.by_examples import ByExamples
from fedllm.stages.weighting.uniform import Uniform
from fedllm.tensors import tree
from fedllm.training.sgd import Sgd
from tests.engines.cohort import CLIENTS, SGD, Devices, Watched, begun, experiment, same, sent, write_records
from tests.runs.small import adapter_hash, events, figures, history

LOST = (ClientOutage("cid", 0), ClientOutage("ann", 1), ClientOutage("dot", 1))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("data") / "people.jsonl")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path / "cache"))


def federation(data: Path, **settings: Any) -> Devices:
    return Devices(str(data), partition=By("who"), **{"heldout": str(data), **settings})


class Counted(dict[str, Request]):
    """Requests that count how many were taken."""

    taken = 0

    def values(self) -> Any:
        for request in super().values():
            self.taken += 1
            yield request


@pytest.mark.parametrize(("stack", "workers"), [(1, 1), (1, 2), (2, 1), (2, 3)])
def test_replies_come_in_request_order_from_a_bounded_window(data: Path, stack: int, workers: int) -> None:
    """An aggregator that takes one reply after another sees at most workers + 1 stacks, and a hand, on their way."""
    made = experiment(data)
    run = server_round.initial_state(made, begun(made))
    with Batched(stack=stack, workers=workers).open(made, None, lambda event: None) as call:
        everyone = RoundContext(0, made.key, 10, 5, 2)
        asked = server_round.requests_for(made, run, CLIENTS[::-1], everyone)
        # the same five once more under other names of the mapping, for a longer queue
        requests = Counted({**asked, **{f"{client}'": request for client, request in asked.items()}})
        order = []
        for place, (client, _) in enumerate(call("work", requests)):
            order.append(client)
            assert requests.taken <= min(10, place + workers * stack + BATCH_OF_STACKS * stack)
    assert order == [*CLIENTS[::-1]] * 2 and requests.taken == 10


def test_clients_that_are_lost_in_the_middle_of_a_stack(data: Path) -> None:
    made = experiment(data, federation=federation(data, failures=LOST), stages=(Prox(0.1), TopK(0.5), Uniform()))
    one, other = (sent(engine, made) for engine in (Serial(), Batched(stack=3, workers=2)))
    lost = {key: reply for key, reply in other.items() if isinstance(reply, Failure)}
    assert lost.keys() == {(0, "cid"), (1, "ann"), (1, "dot")}
    assert all(one[key] == reply for key, reply in lost.items())
    assert lost[0, "cid"].reason == "federation.shards.failures asks for it"
    assert list(one) == list(other)


def test_nobody_and_everybody_lost(data: Path) -> None:
    made = experiment(data)
    assert sent(Batched(stack=2, workers=2), made, cohort=()) == {}
    all_lost = experiment(
        data, federation=federation(data, failures=tuple(ClientOutage(client, 0) for client in CLIENTS))
    )
    found = sent(Batched(stack=2, workers=2), all_lost)
    assert [isinstance(reply, Failure) for reply in found.values()] == [True] * 5 + [False] * 5


@dataclass(frozen=True)
class Absent(Devices):
    """Nobody in round 0."""

    __hash__ = Devices.__hash__

    def sample(self, clients: Sequence[str], round: int, key: Key) -> Sequence[str]:
        return clients if round else ()


def test_an_empty_round(data: Path, tmp_path: Path) -> None:
    made = experiment(data, federation=Absent(str(data), partition=By("who"), heldout=0.0))
    result = fedllm.run(made, engine=Batched(stack=2, workers=2), out=tmp_path / "run")
    rounds = [event for event in events(result.folder) if isinstance(event, RoundFinished)]
    assert [(event.clients, event.note) for event in rounds] == [(0, "nobody was drawn"), (5, "")]


# whole runs


def whole(data: Path, **settings: Any) -> Any:
    stages = (Prox(0.1), TopK(0.5), ByExamples())
    evaluation = Evaluation(metrics=("nll", "exact_match"), every=1, max_new_tokens=3)
    return experiment(
        data,
        dtype="float32",
        stages=stages,
        evaluation=evaluation,
        federation=federation(data, failures=(*LOST, ClientOutage("ben", 1, "evaluate"))),
        **settings,
    )


def test_stacks_of_one_tell_the_story_of_the_serial_engine(data: Path, tmp_path: Path) -> None:
    """Messages and their bytes per client, losses, scores, rounds, and the summary that the traffic meter adds up."""
    made = whole(data)
    serial = fedllm.run(made, engine="serial", out=tmp_path / "serial", name="x")
    batched = fedllm.run(made, engine=Batched(stack=1, workers=3), out=tmp_path / "batched", name="x")
    told = [[record for record in history(run.folder) if record["event"] != "run_started"] for run in (serial, batched)]
    assert told[0] == told[1]
    assert tree.equal(serial.params, batched.params)
    assert adapter_hash(serial.folder) == adapter_hash(batched.folder)
    one, other = figures(serial.folder), figures(batched.folder)
    assert one.pop("engine") == "serial" and other.pop("engine") == "batched"
    assert one == other


def test_larger_stacks_send_the_same_bytes_and_score_the_same(data: Path, tmp_path: Path) -> None:
    made = whole(data)
    runs = [
        fedllm.run(made, engine=engine, out=tmp_path / f"{place}")
        for place, engine in enumerate((Serial(), Batched(stack=3, workers=2)))
    ]
    logs = [events(run.folder) for run in runs]
    messages = [[event for event in log if isinstance(event, MessageSent)] for log in logs]
    assert len(messages[0]) > 30 and messages[0] == messages[1]
    for name in ("bytes_up", "bytes_down", "tokens_trained", "rounds"):
        assert runs[0].summary[name] == runs[1].summary[name]
    failed = [[event for event in log if isinstance(event, ClientFailed)] for log in logs]
    assert len(failed[0]) == 4 and failed[0] == failed[1]
    scores = [[event for event in log if isinstance(event, Evaluated)] for log in logs]
    assert [event.round for event in scores[0]] == [0, 1, 2]
    for one, other in zip(*scores, strict=True):
        assert other.metrics == pytest.approx(one.metrics, rel=1e-4)
        assert other.clients.keys() == one.clients.keys()


def test_the_engine_says_what_it_is(data: Path, tmp_path: Path) -> None:
    run = fedllm.run(experiment(data), engine=Batched(stack=3, workers=2, memory_budget="2GB"), out=tmp_path / "run")
    log = events(run.folder)
    assert [event for event in log if isinstance(event, EngineChosen)] == [EngineChosen("batched", "it was asked for")]
    (started,) = [event for event in log if isinstance(event, EngineStarted)]
    assert (started.workers, started.stack, started.memory_budget, started.peak) == (2, 3, 2 * 10**9, None)
    assert 50_000 < started.parameters < 200_000
    stopped, *_ = [event for event in log if isinstance(event, MemoryMeasured)]
    assert stopped.measured > 10**8 and stopped.predicted > 10**8
    assert log.index(started) < log.index(stopped)


# masks


@pytest.mark.parametrize("stack", [1, 3])
def test_masked_sums_are_the_plain_sums_to_the_bit(data: Path, tmp_path: Path, stack: int) -> None:
    """Five calls behind the work, answered one by one, after clients that were lost in the work."""
    made = experiment(
        data, stages=(Prox(0.1), ByExamples(), FixedPoint(max_weight=8)), federation=federation(data, failures=LOST)
    )
    runs = []
    for name, aggregator in (("plain", made.aggregator), ("masked", SecureSum(corrupt=0.0))):
        watched = Watched(Batched(stack=stack, workers=2))
        done = fedllm.run(replace(made, aggregator=aggregator), engine=watched, out=tmp_path / name)
        runs.append((done.params, watched.sent))
    assert tree.equal(runs[0][0], runs[1][0])
    plain, masked = runs[0][1], runs[1][1]
    assert {name for name, _, _ in masked} == {"work", "advertise", "share", "mask", "agree", "unmask"}
    hidden = [key for key in plain if isinstance(plain[key], Update)]
    assert len(hidden) == 7 and not any(same(plain[key], masked[key]) for key in hidden)


# Ctrl-C


@contextmanager
def pressed(at: int) -> Iterator[list[int]]:
    """Ctrl-C in a client's local step with this number. Counts the steps."""
    steps, real = [0], Sgd._client_step

    def step(work: Sgd, *args: Any) -> None:
        steps[0] += 1
        if steps[0] == at:
            os.kill(os.getpid(), signal.SIGINT)
        real(work, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sgd, "_client_step", step)
        yield steps


@pytest.mark.parametrize("stack", [2, 4])
def test_ctrl_c_in_the_middle_of_a_stack(data: Path, tmp_path: Path, stack: int) -> None:
    """Stacks stop between two steps. Round 1 is run again from its start, with what the clients then remembered."""
    made = replace(whole(data, work=replace(SGD, steps=12)), evaluation=Evaluation(metrics=("nll",), every=1))
    engine = Batched(stack=stack, workers=2)
    with pressed(at=-1) as counted:
        whole_run = fedllm.run(made, engine=engine, out=tmp_path / "whole", name="x")
    first = 12 * 4  # of round 0, in which one client is lost
    assert counted[0] == first + 12 * 3
    with pressed(at=first + 8) as counted, pytest.raises(Interrupted, match="1 complete round is saved"):
        fedllm.run(made, engine=engine, out=tmp_path / "run", name="x")
    assert first + 8 <= counted[0] < first + 12 * 3
    done = fedllm.run(made, engine=engine, out=tmp_path / "run", name="x", resume=True)
    assert tree.equal(done.params, whole_run.params)
    assert adapter_hash(done.folder) == adapter_hash(whole_run.folder)
    assert figures(done.folder) == figures(whole_run.folder)
    assert history(done.folder) == history(whole_run.folder)


def test_a_run_goes_on_with_another_engine(data: Path, tmp_path: Path) -> None:
    """The engine is no part of the experiment; with stacks of one the bits are the serial engine's."""
    made = whole(data)
    serial = fedllm.run(made, engine="serial", out=tmp_path / "serial", name="x")

    def stop(event: Event) -> None:
        if isinstance(event, RoundFinished) and event.round == 0:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        fedllm.run(made, engine="serial", out=tmp_path / "run", name="x", listeners=[stop])
    done = fedllm.run(made, engine=Batched(stack=1, workers=2), out=tmp_path / "run", name="x", resume=True)
    assert tree.equal(done.params, serial.params)
    chosen = [event.engine for event in events(done.folder) if isinstance(event, EngineChosen)]
    assert chosen == ["serial", "batched"]
