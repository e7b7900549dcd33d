"""What is asked for, by hand; and the first malformed update is the one that is refused, whoever answers first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedllm.aggregators.secure_sum import SecureSum
from fedllm.engines.loopback import ReceivedReply, Reply
from fedllm.errors import FedllmError
from fedllm.events import ClientFailed, ClientFinished, Event
from fedllm.experiment import config_file
from fedllm.experiment.methods import METHODS
from fedllm.experiment.record import Experiment
from fedllm.messages import serialization
from fedllm.messages.call import Replies
from fedllm.messages.context import Profile, RoundContext
from fedllm.messages.update import Asked, Part, Request, Update
from fedllm.runs import server_round
from fedllm.runs.expected_update import asked
from fedllm.stages.base import Stage
from fedllm.tensors.tree import Tree
from fedllm.training.base import ClientJob

CLIENTS = ("ann", "ben", "cid")
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
PARAMS: Tree = {"l.lora_A": torch.ones(2, 5), "l.lora_B": torch.ones(3, 2), "norm": torch.ones(4)}
A, B, NORM = {"l.lora_A": (F32, (2, 5))}, {"l.lora_B": (F32, (3, 2))}, {"norm": (F32, (4,))}
ALL = A | B | NORM
COUNTS = {"steps": (F64, ()), "tokens": (F64, ()), "computed": (F64, ())}
ALWAYS = {"metrics": {"loss": (F64, ())}, "counts": COUNTS}
STACK = {"rows": {"l": (F32, (6, 5))}, "columns": {"l": (F32, (6, 3))}}  # three clients of rank 2
MARKS = {"l.lora_A": (F32, (2,)), "l.lora_B": (F32, (2,))}


SPEC: Mapping[str, Any] = {
    "task": {"model": "tiny-llama", "adapter": {"lora": {"rank": 2}}},
    "federation": {"shards": {"data": "quickstart", "clients": 3, "partition": "iid"}},
    "work": {"sgd": {"steps": 1}},
    "rounds": 3,
}


def experiment(*stages: Any, **changes: Any) -> Experiment:
    """No model is loaded and no data read for any of this."""
    return config_file.build({**SPEC, "task": {**SPEC["task"], **changes}, "stages": list(stages)})


def requests(exp: Experiment, params: Tree = PARAMS, scores: Tree | None = None) -> Mapping[str, Request]:
    run = server_round.initial_state(exp, params)
    return server_round.requests_for(exp, run, CLIENTS, RoundContext(0, exp.key, 3, 3, 3), scores)


def shapes(found: Asked | None) -> dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
    assert found is not None
    return {
        part: {name: (dtype, tuple(shape)) for name, (dtype, shape) in leaves.items()} for part, leaves in found.items()
    }


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        (["by_examples"], {"delta": ALL}),
        (["scaffold", "uniform"], {"delta": ALL, "control": ALL}),
        (["by_examples", {"top_k": 0.5}, {"quantize": 4}], {"delta": ALL}),
        ([{"keep": {"patterns": ["*lora_B"]}}, "uniform"], {"delta": A | NORM}),
        (["lora_pad", "uniform"], {"delta": ALL, "holders": MARKS}),
        (["lora_stack", "uniform"], {"delta": NORM, **STACK, "holders": {"l": (F32, (2,))}}),
        (["lora_residual", "uniform"], {"delta": NORM, **STACK, "shares": {"share": (F64, (3,))}}),
        (["lora_product", "uniform"], {"delta": {"l.lora_BA": (F32, (3, 5)), **NORM}}),
    ],
)
def test_types_and_shapes_by_hand(stages: Sequence[Any], expected: dict[str, Any]) -> None:
    found = next(iter(requests(experiment(*stages)).values())).asks("work")
    assert shapes(found) == {**expected, **ALWAYS}


def test_a_client_of_a_lower_rank_is_asked_for_the_whole_shape() -> None:
    exp = experiment("lora_pad", "uniform")
    (request, *_) = requests(exp).values()
    cut = {"l.lora_A": PARAMS["l.lora_A"][:1], "l.lora_B": PARAMS["l.lora_B"][:, :1], "norm": PARAMS["norm"]}
    low = replace(request, params=cut, ctx=replace(request.ctx, profile=Profile(rank=1)))
    assert shapes(asked(exp, low, PARAMS)) == {"delta": ALL, "holders": MARKS, **ALWAYS}


def test_rounding_makes_float32_of_16_bits() -> None:
    half = {name: leaf.to(BF16) for name, leaf in PARAMS.items()}
    for stages, dtype in ((["uniform"], BF16), (["uniform", {"quantize": 8}], F32)):
        found = shapes(next(iter(requests(experiment(*stages), half).values())).asks("work"))
        assert {leaf[0] for leaf in found["delta"].values()} == {dtype}


def test_the_work_decides_on_the_types() -> None:
    """It computes all leaves in the widest type."""
    mixed = {**PARAMS, "norm": PARAMS["norm"].to(BF16)}
    exp = experiment("uniform")
    (outcome,) = exp.work.finish(exp.work.init([ClientJob(RoundContext(0, exp.key, 1, 1, client="a"), mixed, ())]))
    assert not isinstance(outcome, str)
    told = {name: (leaf.dtype, tuple(leaf.shape)) for name, leaf in outcome[0].parts["delta"].tree.items()}
    assert told == ALL == shapes(next(iter(requests(exp, mixed).values())).asks("work"))["delta"]


def test_what_stands_still_in_a_round_is_not_asked_for() -> None:
    exp = experiment("uniform", scope={"alternate": ["*lora_A", "*[Bm]"]})
    run = server_round.initial_state(exp, PARAMS)
    for round, moving in ((0, A), (1, B | NORM), (2, A)):
        everyone = RoundContext(round, exp.key, 3, 3, 3)
        found = server_round.requests_for(exp, replace(run, round=round), CLIENTS, everyone)["ben"].asks("work")
        assert shapes(found) == {"delta": moving, **ALWAYS}


def test_an_evaluation_asks_for_its_scores() -> None:
    scores = {"sum/nll": torch.zeros((), dtype=F64), "count/nll": torch.zeros((), dtype=F64)}
    found = requests(experiment("scaffold", "by_examples"), scores=scores)["ann"].asks("evaluate")
    assert shapes(found) == {"metrics": {"sum/nll": (F64, ()), "count/nll": (F64, ())}}
    unknown = requests(experiment("scaffold", "by_examples"))["ann"]
    assert unknown.asks("evaluate") is None and unknown.asks("keys") is None, "of other calls nothing is known"


@pytest.mark.parametrize("method", METHODS)
def test_it_is_known_for_every_method(method: str) -> None:
    spec = {key: value for key, value in SPEC.items() if key != "stages"}
    if METHODS[method].work == "zeroth_order":
        spec["work"] = {"zeroth_order": {"steps": 1, **({} if method == "fedmezo" else {"pool": 8})}}
    exp = config_file.build({**spec, "task": {"model": "tiny-llama"}, "method": method})
    params = {**PARAMS, "l.lora_sparse": torch.ones(1)} if method == "slora" else PARAMS
    found = shapes(requests(exp, params)["cid"].asks("work"))
    assert found.keys() >= {"delta", *({} if exp.private else ALWAYS)}


class Picky(Stage):
    """Takes no zeros."""

    def encode(self, *_: Any) -> Any:
        """Refuse."""
        raise FedllmError("zeros")


def test_where_it_is_not_known_nothing_is_asked_for() -> None:
    exp = experiment("uniform")
    for unknown in (replace(exp, aggregator=SecureSum()), replace(exp, stages=(*exp.stages, Picky()))):
        assert requests(unknown)["ann"].asks("work") is None


def test_it_is_worked_out_once_for_all_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    exp, rounds = experiment("uniform", {"top_k": 0.25}), []
    monkeypatch.setattr("fedllm.runs.expected_update.receive_all", lambda *given: rounds.append(1) or ({}, None))
    monkeypatch.setattr("fedllm.runs.expected_update.encode_all", lambda *given: (Update({}), ()))
    for _ in range(3):
        assert [request.asks("work") for request in requests(exp, {"w": torch.ones(7, 1)}).values()] == [{}] * 3
    assert rounds == [1]


def update(size: float, **leaves: torch.Tensor) -> Update:
    """Of weight 1: a delta that is `size` everywhere, but for some leaves, a loss and counts."""
    zero = torch.zeros((), dtype=F64)
    delta = {name: torch.full_like(leaf, size) for name, leaf in PARAMS.items()} | leaves
    counts = Part({name: zero for name in COUNTS}, 0.0)
    return Update({"delta": Part(delta, 1.0), "metrics": Part({"loss": zero}, 1.0), "counts": counts})


MALFORMED = {
    "shape": update(1.0, norm=torch.ones(1)),
    "type": update(1.0, norm=torch.ones(4, dtype=F64)),
    "leaf too many": update(1.0, more=torch.ones(1)),
    "part too many": update(1.0).having("more", Part({"w": torch.ones(1)}, 0.0)),
    "part without leaves": update(1.0).having("delta", Part({}, 1.0)),
}


@pytest.mark.parametrize("culprit", [0, 1])
@pytest.mark.parametrize("case", MALFORMED)
def test_the_malformed_reply_is_refused_and_not_the_next_one(case: str, culprit: int) -> None:
    """The others' round: the mean of 2 and 4, or of 1 and 4."""
    replies, events = [update(1.0), update(2.0), update(4.0)], list[Event]()
    replies[culprit] = MALFORMED[case]

    def call(name: str, requests: Mapping[str, Request]) -> Replies:
        for (client, request), reply in zip(requests.items(), replies, strict=True):
            yield client, ReceivedReply.of(Reply(serialization.serialize(reply), {}, 0), name, request).answer

    exp = experiment("uniform")
    after, result = server_round.run_round(server_round.initial_state(exp, PARAMS), exp, CLIENTS, call, events.append)
    (lost,) = (event for event in events if isinstance(event, ClientFailed))
    assert lost.client == CLIENTS[culprit] and "its reply is refused" in lost.reason
    assert [event.client for event in events if isinstance(event, ClientFinished)] == [
        client for client in CLIENTS if client != lost.client
    ]
    assert result.clients == 2
    mean = {0: 3.0, 1: 2.5}[culprit]
    assert all(bool((leaf == 1 + mean).all()) for leaf in after.params.values())


def test_bytes_that_cannot_be_read_are_a_failure_of_their_client() -> None:
    request = requests(experiment("uniform"))["ben"]
    for data in (b"", b"\x80\x04.", serialization.serialize(request), serialization.serialize(update(1.0))[:-1]):
        answer = ReceivedReply.of(Reply(data, {}, 7), "work", request)
        assert answer.answer == replace(answer.answer, client="ben", round=0) and answer.sent == 7
        assert "its reply is refused" in getattr(answer.answer, "reason", "")
