"""Bytes as they can be computed by hand, limits, and how long a run took."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

import fedllm
from fedllm.events import CheckpointSaved, Evaluated, MessageSent, Resumed, RoundFinished, RoundStarted, RunFinished
from fedllm.experiment.record import Experiment
from fedllm.messages import serialization
from fedllm.messages.context import RoundContext
from fedllm.messages.update import Request
from fedllm.models.loaded_model import load
from fedllm.rng import Key
from fedllm.runs.resource_usage import TrafficMeter, elapsed
from tests.runs.small import Stop, StopAt, events, small

# tiny-llama: 2 layers, hidden 64, 4 heads and 2 key-value heads of 16, MLP 192, 259 tokens, tied
Q_AND_V = 2 * ((64 + 64) + (64 + 32))  # sum over layers of in + out of q_proj and v_proj
ALL = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 192 + 2 * 64) + 64 + 259 * 64
FIGURES = {"metrics": 8, "counts": 24}  # float64: the loss; steps and tokens


def header(payload: bytes) -> int:
    """Bytes of a safetensors file before the values: the length, and the JSON that it counts."""
    return 8 + int.from_bytes(payload[:8], "little")


def sent(folder: Path, direction: str, call: str = "work") -> list[MessageSent]:
    return [e for e in events(folder) if isinstance(e, MessageSent) and (e.direction, e.call) == (direction, call)]


def test_each_message_is_its_values_and_its_header(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    payloads: list[bytes] = []

    def recorded(message: serialization.Message) -> bytes:
        payloads.append(serialize(message))
        return payloads[-1]

    serialize = serialization.serialize
    monkeypatch.setattr(serialization, "serialize", recorded)
    fedllm.run(small(data, rounds=2), out=tmp_path / "run", engine="serial")  # one message after another
    messages = [event for event in events(tmp_path / "run") if isinstance(event, MessageSent)]
    assert len(messages) == len(payloads) == 2 * 2 * (3 + 3)  # rounds x directions x (work and evaluate of 3 clients)
    for message, payload in zip(messages, payloads, strict=True):
        assert message.bytes == len(payload)
        assert sum(message.parts.values()) == len(payload) - header(payload)
    for message in sent(tmp_path / "run", "down"):
        assert message.parts == {"params": 4 * 2 * Q_AND_V}
    for message in sent(tmp_path / "run", "up"):
        assert message.parts == {"delta": 4 * 2 * Q_AND_V, **FIGURES}
        assert message.bytes - sum(message.parts.values()) < 3000, "the header"


def test_sums_are_those_of_the_messages(finished: fedllm.Result) -> None:
    messages = [event for event in events(finished.folder) if isinstance(event, MessageSent)]
    for name, direction in (("bytes_up", "up"), ("bytes_down", "down")):
        assert finished.summary[name] == sum(event.bytes for event in sent(finished.folder, direction))
    evaluated = sum(event.bytes for event in messages if event.call == "evaluate")
    assert finished.summary["evaluation_bytes"] == evaluated > 0
    for done in (event for event in events(finished.folder) if isinstance(event, RoundFinished)):
        for direction, total in (("up", done.bytes_up), ("down", done.bytes_down)):
            assert total == sum(e.bytes for e in sent(finished.folder, direction) if e.round == done.round)


def test_full_weights_are_four_bytes_a_value(data: Path, tmp_path: Path) -> None:
    experiment = small(data, task__adapter="full", rounds=1, work__sgd__steps=0, evaluation__metrics=[])
    fedllm.run(experiment, out=tmp_path / "run")
    for direction, part in (("down", "params"), ("up", "delta")):
        assert {message.parts[part] for message in sent(tmp_path / "run", direction)} == {4 * ALL}


def test_a_lost_client_costs_only_what_it_was_sent(data: Path, tmp_path: Path) -> None:
    lost = [{"client": "ben", "round": 0}]
    fedllm.run(small(data, rounds=1, federation__shards__failures=lost), out=tmp_path / "run")
    assert [message.client for message in sent(tmp_path / "run", "down")] == ["ann", "ben", "cid"]
    assert [message.client for message in sent(tmp_path / "run", "up")] == ["ann", "cid"]


@pytest.mark.model
def test_smollm2_as_the_closed_form_says(smollm2: str, data: Path, tmp_path: Path) -> None:
    lora = {"lora": {"rank": 8, "targets": ["q_proj", "v_proj"]}}
    experiment = small(
        data,
        task={"model": smollm2, "adapter": lora, "device": "cpu", "dtype": "float32"},
        work__sgd__steps=0,
        evaluation__metrics=[],
        rounds=1,
    )
    fedllm.run(experiment, out=tmp_path / "run")
    values = 30 * 8 * ((576 + 576) + (576 + 192)) * 4
    assert values == 1_843_200
    for direction, parts in (("down", {"params": values}), ("up", {"delta": values, **FIGURES})):
        messages = sent(tmp_path / "run", direction)
        assert [message.client for message in messages] == ["ann", "ben", "cid"]
        for message in messages:
            assert message.parts == parts
            assert 0 < message.bytes - sum(parts.values()) < 20_000, "the header: 120 leaves of at most 160 bytes"
    assert 3 * values < fedllm.run(experiment, out=tmp_path / "run").summary["bytes_down"] < 3 * (values + 20_000)


@pytest.mark.model
def test_smollm2_full_is_what_its_weights_take(smollm2: str, data: Path) -> None:
    task = {"model": smollm2, "adapter": "full", "device": "cpu", "dtype": "float32"}
    params = load(small(data, task=task).task).initial_params(Key(0))
    request = Request(params, (), RoundContext(0, Key(0), 1, 1))
    assert serialization.part_bytes(request) == {"params": 538_060_032}


def limited(data: Path, **limits: float) -> Experiment:
    return small(data, rounds=5, limits=limits, evaluation__every=None)


def test_bytes_end_a_run(data: Path, tmp_path: Path, finished: fedllm.Result) -> None:
    per_round = (finished.summary["bytes_up"] + finished.summary["bytes_down"]) // 3
    result = fedllm.run(limited(data, bytes=per_round + 1000), out=tmp_path / "run")
    log = events(tmp_path / "run")
    assert [event.round for event in log if isinstance(event, RoundStarted)] == [0, 1]
    (end,) = (event for event in log if isinstance(event, RunFinished))
    total = result.summary["bytes_up"] + result.summary["bytes_down"]
    assert end.note == f"limits.bytes ({per_round + 1000}) was reached with {total} bytes after 2 rounds"
    assert result.summary["rounds"] == 2
    scored = [event for event in log if isinstance(event, Evaluated) and event.which == "federated"]
    assert [event.round for event in scored] == [2], "the last round is scored, whatever ended the run"
    assert result.summary["eval"]["federated"] == scored[0].metrics
    assert fedllm.run(limited(data, bytes=per_round + 1000), out=tmp_path / "run").summary == result.summary


def test_seconds_end_a_run_also_after_a_resume(data: Path, tmp_path: Path) -> None:
    stop = StopAt(lambda event: isinstance(event, CheckpointSaved) and event.round == 1)
    experiment = limited(data, seconds=1e-9)
    with pytest.raises(Stop):
        fedllm.run(experiment, out=tmp_path / "run", listeners=[stop])
    result = fedllm.run(experiment, out=tmp_path / "run", resume=True)
    assert result.summary["rounds"] == 1
    log = events(tmp_path / "run")
    assert [event.round for event in log if isinstance(event, RoundStarted)] == [0]
    assert [event.note for event in log if isinstance(event, RunFinished)] == [
        "limits.seconds (1e-09) was reached after 1 round"
    ]
    assert result.summary["eval"]["federated"] is not None


def test_a_limit_that_the_last_round_meets_has_ended_nothing(data: Path, tmp_path: Path) -> None:
    fedllm.run(small(data, rounds=1, limits__bytes=1), out=tmp_path / "run")
    assert [event.note for event in events(tmp_path / "run") if isinstance(event, RunFinished)] == [""]


def test_traffic_meter_adds_by_direction_and_empties() -> None:
    meter = TrafficMeter()
    for size, call, direction in ((1, "work", "up"), (20, "work", "down"), (300, "evaluate", "up"), (7, "keys", "up")):
        meter(MessageSent(0, call, "a", direction, size, {}))
    meter(Resumed(3))
    taken = meter.reset()
    assert (taken.bytes_up, taken.bytes_down, taken.evaluation_bytes) == (8, 20, 300)
    assert meter.reset() == type(taken)()


def test_time_between_processes_is_not_counted() -> None:
    begun, other = Resumed(0), CheckpointSaved(0)
    assert elapsed([]) == 0
    assert elapsed([(5.0, other)]) == 0
    assert elapsed([(5.0, other), (6.5, other), (8.0, other)]) == 3.0
    assert elapsed([(5.0, other), (6.0, other), (100.0, begun), (100.5, other), (900.0, begun)]) == 1.5


def test_time_before_the_first_event_is_counted(data: Path, tmp_path: Path) -> None:
    """What a command takes to load model and data, of each process."""
    other = CheckpointSaved(0)
    assert elapsed([(5.0, Resumed(0, 2.0)), (6.0, other), (100.0, Resumed(1, 4.0)), (100.5, other)]) == 7.5
    began = time.time() - 1000
    made = fedllm.run(small(data, rounds=0), out=tmp_path / "run", began=began)
    assert 1000 <= made.summary["seconds"] <= time.time() - began


def test_json_of_the_log_is_flat(finished: fedllm.Result) -> None:
    lines = (finished.folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
    kinds = [json.loads(line)["event"] for line in lines]
    assert kinds[0] == "run_started" and kinds[-1] == "run_finished"
