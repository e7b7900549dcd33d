"""Where later work is put in: an aggregator with several conversations, and an engine in other processes.

Both doubles must give the bits of the serial engine and the plain sum. Each run is a whole one, with evaluation.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedllm.aggregators.sum import Sum
from fedllm.data.shards import ClientOutage, Shards
from fedllm.engines.base import Engine
from fedllm.engines.serial import Serial
from fedllm.errors import ClientError
from fedllm.events import ClientFailed, ClientFinished, Emit, Evaluated, MessageSent, RoundFinished, read
from fedllm.experiment import catalog, config_file
from fedllm.experiment.record import Demands, Experiment
from fedllm.messages.call import Call, Replies
from fedllm.messages.context import ClientContext, RoundContext
from fedllm.messages.serialization import deserialize, serialize
from fedllm.messages.update import Failure, Part, Request, Update
from fedllm.rng import Key
from fedllm.runs.launch import Result, run
from fedllm.tensors import tree
from tests.doubles.masks import Masked, Rounding
from tests.doubles.processes import DOUBLES, Processes

CLIENTS = ("ann", "ben", "cid")


@pytest.fixture(autouse=True)
def doubles(monkeypatch: pytest.MonkeyPatch, cache_folder: Path) -> None:
    """Files may name the doubles."""
    for noun, table in DOUBLES.items():
        for name, cls in table.items():
            monkeypatch.setitem(catalog.NOUNS[noun], name, cls)


def spec(folder: Path, clients: Sequence[str] = CLIENTS, **changes: Any) -> dict[str, Any]:
    """Two rounds of two steps on a model with random weights, and a few records in `folder` for each client."""
    data = folder / "records.jsonl"
    texts = [
        (f"{who} {number}?", f"{who[::-1]}{number * 7}", who) for number in range(5) for who in clients[number % 2 :]
    ]
    records = [dict(zip(("prompt", "response", "who"), text, strict=True)) for text in texts]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    return {
        "task": {"model": "tiny-llama", "adapter": {"lora": {"rank": 2, "alpha": 4, "targets": ["q_proj", "v_proj"]}}},
        "federation": {"shards": {"data": str(data), "partition": {"by": "who"}, "heldout": str(data)}},
        "work": {"sgd": {"lr": 0.1, "steps": 2, "batch_size": 2, "max_length": 64}},
        "stages": ["by_examples", "rounding"],
        "evaluation": {"metrics": ["nll"], "every": 1, "limit": 2},
        "rounds": 2,
        **changes,
    }


@dataclass
class Seen(Engine):
    """The serial engine, and what it handed to the server."""

    replies: list[tuple[str, int, str, Update | Failure]] = field(default_factory=list)

    @contextmanager
    def open(self, experiment: Experiment, folder: Path | None, emit: Emit) -> Iterator[Call]:
        with Serial().open(experiment, folder, emit) as call:

            def watched(name: str, requests: Mapping[str, Request]) -> Replies:
                for client, reply in call(name, requests):
                    kept = deserialize(serialize(reply))  # a copy: the reply itself is the aggregator's
                    assert not isinstance(kept, Request)
                    self.replies.append((name, requests[client].ctx.round, client, kept))
                    yield client, reply

            yield watched

    def updates(self, name: str) -> dict[tuple[int, str], Update]:
        """The answers to a call, by round and client."""
        return {(r, c): reply for call, r, c, reply in self.replies if call == name and isinstance(reply, Update)}


def lose(experiment: Experiment, *losses: ClientOutage) -> Experiment:
    assert isinstance(experiment.federation, Shards)
    return replace(experiment, federation=replace(experiment.federation, failures=losses))


def masked(experiment: Experiment, *, unmask: bool = True) -> Experiment:
    return replace(experiment, aggregator=Masked(unmask), demands=Demands(secrecy=True))


def outcome(result: Result) -> tuple[str, Any, Any]:
    """What must not depend on engine and aggregator: parameters, scores, and each round's loss, tokens and clients."""
    events = [event for _, event in read(result.folder / "events.jsonl")]
    rounds = [(e.clients, e.loss, e.tokens, e.note) for e in events if isinstance(e, RoundFinished)]
    scores = [(e.which, e.round, e.metrics) for e in events if isinstance(e, Evaluated)]
    return tree.digest(result.params), rounds, scores


LOST = ClientOutage("ben", 1, "work")  # between "peers" and "unmask" of the second round


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Seen]:
    """The reference: the serial engine and the plain sum of rounded integers, with one client lost."""
    with pytest.MonkeyPatch.context() as patch:
        for noun, table in DOUBLES.items():
            for name, cls in table.items():
                patch.setitem(catalog.NOUNS[noun], name, cls)
        folder, seen = tmp_path_factory.mktemp("plain"), Seen()
        patch.setenv("FEDLLM_CACHE", str(folder / "cache"))
        return run(lose(config_file.build(spec(folder)), LOST), engine=seen, out=folder / "run"), seen


def test_the_masked_sum_is_the_plain_sum_to_the_bit(plain: tuple[Result, Seen], tmp_path: Path) -> None:
    reference, plainly = plain
    seen = Seen()
    result = run(lose(masked(config_file.build(spec(tmp_path))), LOST), engine=seen, out=tmp_path / "run")
    assert outcome(result) == outcome(reference)
    calls = [name for name, *_ in seen.replies]
    assert calls == (
        ["keys"] * 3 + ["peers"] * 3 + ["work"] * 3 + ["keys"] * 3 + ["peers"] * 3 + ["evaluate"] * 3
        + ["keys"] * 3 + ["peers"] * 3 + ["work"] * 3 + ["unmask"] * 2 + ["keys"] * 3 + ["peers"] * 3 + ["evaluate"] * 3
    )  # fmt: skip
    for name in ("work", "evaluate"):
        hidden, shown = seen.updates(name), plainly.updates(name)
        assert hidden.keys() == shown.keys() and len(shown) == (5 if name == "work" else 6)
        for place, update in shown.items():
            for part_name, part in update.parts.items():
                other = hidden[place].parts[part_name]
                assert other.weight == part.weight and other.tree.keys() == part.tree.keys()
                for leaf_name, leaf in part.tree.items():
                    assert leaf.dtype == other.tree[leaf_name].dtype == torch.int64
                    # the chance that one mask of 64 bits is 0 is 2^-64; plain integers are small, masked ones are not
                    assert not bool((leaf == other.tree[leaf_name]).any()), (name, place, leaf_name)
                    assert int(leaf.abs().max()) < 2**40


def test_the_server_is_told_no_client_alone(tmp_path: Path) -> None:
    result = run(masked(config_file.build(spec(tmp_path, rounds=1))), engine="serial", out=tmp_path / "run")
    events = [event for _, event in read(result.folder / "events.jsonl")]
    finished = [event for event in events if isinstance(event, ClientFinished)]
    assert len(finished) == 3 and all(event.loss is None and event.tokens is None for event in finished)
    scores = [event for event in events if isinstance(event, Evaluated) and event.which == "federated"]
    assert len(scores) == 1 and scores[0].metrics and not any(scores[0].clients.values())


def test_the_masks_of_a_lost_client_stay_without_the_last_call(plain: tuple[Result, Seen], tmp_path: Path) -> None:
    reference, _ = plain
    experiment = masked(config_file.build(spec(tmp_path)), unmask=False)
    whole = run(experiment, engine="serial", out=tmp_path / "whole")  # with nobody lost the masks cancel by themselves
    assert outcome(whole) == outcome(run(config_file.build(spec(tmp_path)), engine="serial", out=tmp_path / "plain"))
    wrong = run(lose(experiment, LOST), engine="serial", out=tmp_path / "wrong")
    assert outcome(wrong)[1][0] == outcome(reference)[1][0]  # the first round lost nobody
    error = max(float((wrong.params[name] - leaf).abs().max()) for name, leaf in reference.params.items())
    assert error > 1e3


@pytest.mark.parametrize(
    ("losses", "clients"),
    [
        ([ClientOutage("ann", 0, "keys")], 2),
        ([ClientOutage("ann", 0, "peers")], 2),
        ([ClientOutage("ann", 0, "keys"), ClientOutage("cid", 0, "peers"), ClientOutage("ben", 0, "unmask")], 1),
        ([ClientOutage(client, 0, "work") for client in CLIENTS], 0),
        ([ClientOutage(client, 0, "keys") for client in CLIENTS], 0),
    ],
)
def test_clients_may_be_lost_in_any_call(losses: list[ClientOutage], clients: int, tmp_path: Path) -> None:
    experiment = replace(
        config_file.build(spec(tmp_path, rounds=2)),
        evaluation=replace(config_file.build(spec(tmp_path)).evaluation, metrics=()),
    )
    if ClientOutage("ben", 0, "unmask") in losses:
        with pytest.raises(ClientError, match="ben did not unmask"):
            run(lose(masked(experiment), *losses), engine="serial", out=tmp_path / "run")
        return
    result = run(lose(masked(experiment), *losses), engine="serial", out=tmp_path / "run")
    gone = [replace(loss, call="work") for loss in losses]
    assert outcome(result) == outcome(run(lose(experiment, *gone), engine="serial", out=tmp_path / "plain"))
    events = [event for _, event in read(result.folder / "events.jsonl")]
    assert [event.client for event in events if isinstance(event, ClientFailed)] == [loss.client for loss in losses]
    assert [event.clients for event in events if isinstance(event, RoundFinished)] == [clients, 3]


STATEFUL: Mapping[str, Any] = {
    "stages": ["scaffold", {"top_k": {"fraction": 0.3}}, "uniform", "rounding"],
    "aggregator": "masked",
    "demands": {"secrecy": True},
}


@pytest.mark.slow
def test_processes_that_exchange_bytes_equal_the_serial_engine(tmp_path: Path) -> None:
    """With memories, state, integers and masks. Few bits and a plain sum in other processes: tests/conformance, Ray."""
    experiment = config_file.build(spec(tmp_path, CLIENTS[:2], **STATEFUL))
    engines: dict[str, Engine] = {"serial": Serial(), "processes": Processes()}
    results = {name: run(experiment, engine=engine, out=tmp_path / name) for name, engine in engines.items()}
    assert outcome(results["processes"]) == outcome(results["serial"])
    assert saved(results["processes"]) == saved(results["serial"]) != {}
    assert sent(results["processes"]) == sent(results["serial"])


def saved(result: Result) -> dict[str, bytes]:
    """Server states and clients' memories, as files."""
    folder = result.folder / "checkpoints"
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}


def sent(result: Result) -> list[MessageSent]:
    """Every message, by client, for engines that ask all before they hear one."""
    found = [event for _, event in read(result.folder / "events.jsonl") if isinstance(event, MessageSent)]
    return sorted(found, key=lambda event: (event.round, event.client, event.call, event.direction))


def test_rounding_by_hand() -> None:
    stage, ctx = Rounding(bits=3), RoundContext(round=0, key=Key(0), cohort=2, population=2)
    update = Update(
        {
            "delta": Part({"w": torch.tensor([0.0625, 0.1, -1.0])}, 2.0),
            "metrics": Part({"loss": torch.tensor(0.5)}, 0.0),
        }
    )
    sent, _ = stage.encode(update, {}, {}, ClientContext(ctx))
    integers = sent.parts["delta"].tree["w"]
    assert integers.dtype == torch.int64 and integers.tolist() == [0, 1, -8]  # halves go to the even one
    back, _ = stage.decode(
        Sum().reduce(lambda _, asked: iter([("a", sent), ("b", sent)]), {}), update.parts["delta"].tree, {}, ctx
    )
    assert back.parts["delta"].weight == 4.0
    assert tree.equal(back.parts["delta"].tree, {"w": torch.tensor([0.0, 0.25, -2.0])})
    assert tree.equal(back.parts["metrics"].tree, {"loss": torch.tensor(1.0, dtype=torch.float64)})
