"""Clients of unequal data on a small model, what each of them sends, and how far two engines are apart."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedllm.data.partitioners.by import By
from fedllm.data.shards import Shards
from fedllm.engines.base import Engine
from fedllm.engines.client import Site
from fedllm.engines.serial import Serial
from fedllm.evaluation.settings import Evaluation
from fedllm.events import CheckpointSaved, Emit, Event
from fedllm.experiment.record import Experiment
from fedllm.messages.call import Call, Replies
from fedllm.messages.context import ClientContext, Profile, RoundContext
from fedllm.messages.update import Failure, Request, Update, not_known
from fedllm.models.adapters.base import Adapter
from fedllm.models.adapters.lora import Lora
from fedllm.models.task import Task
from fedllm.runs import launch, server_round
from fedllm.stages.base import Stage
from fedllm.stages.weighting.uniform import Uniform
from fedllm.tensors import tree
from fedllm.tensors.tree import Tree
from fedllm.training.base import Work
from fedllm.training.sgd import Sgd

SIZES = {"ann": 6, "ben": 3, "cid": 2, "dot": 5, "eve": 1}
CLIENTS = tuple(SIZES)
LORA = Lora(rank=4, alpha=8)
SERIAL = Serial()
SGD = Sgd(lr=0.05, steps=3, batch_size=2, max_length=48, momentum=0.9)
ADAMW = Sgd("adamw", lr=0.01, steps=3, batch_size=2, max_length=48)


def write_records(path: Path, changed: str | None = None) -> Path:
    """Different numbers and lengths of records. One client's answers may be others of the same lengths."""
    rows = []
    for place, (who, size) in enumerate(SIZES.items()):
        for number in range(size):
            answer = "".join(
                chr(97 + (5 * number + 3 * place + at * at) % 26) for at in range(1 + (number + place) % 5)
            )
            if who == changed:
                answer = answer.swapcase()
            rows.append({"who": who, "prompt": "ab" * (1 + (number * 3 + place) % 7), "response": answer})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_long(path: Path) -> Path:
    """One record a client, which fills any `max_length`: 21 tokens of prompt, then the answer."""
    rows = [{"who": who, "prompt": "ab", "response": "c" * 200} for who in CLIENTS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Devices(Shards):
    """Clients with devices of their own: ranks by client, and a device of the client's name."""

    ranks: tuple[tuple[str, int], ...] = ()

    __hash__ = Shards.__hash__

    def profile(self, client: str) -> Profile:
        return Profile(rank=dict(self.ranks).get(client), device=client)


@dataclass(frozen=True)
class Own(Sgd):
    """Settings that devices have of their own, as (device, setting, value)."""

    own: tuple[tuple[str, str, Any], ...] = ()

    def for_profile(self, profile: Profile) -> Sgd:
        changes = {name: value for device, name, value in self.own if device == profile.device}
        if "epochs" in changes:
            changes["steps"] = None
        return replace(self, **changes)


@dataclass(frozen=True)
class Slice(Stage):
    """Sends the first ranks of a low-rank adapter, as many as the client's device holds."""

    def broadcast(self, params: Tree, state: Tree, ctx: RoundContext) -> tuple[Tree, Tree]:
        rank = ctx.profile.rank
        return {n: leaf[:rank] if n.endswith("lora_A") else leaf[:, :rank] for n, leaf in params.items()}, {}


@dataclass(frozen=True)
class Spoil(Stage):
    """One client's gradients are NaN."""

    client: str | None

    def receive(self, params: Tree, extra: Tree, memory: Tree, local: ClientContext) -> tuple[Tree, Tree]:
        return params, {"factor": torch.tensor(torch.nan if local.ctx.client == self.client else 1.0)}

    def grads(self, grads: Tree, params: Tree, scratch: Tree) -> Tree:
        return {name: grad * scratch["factor"] for name, grad in grads.items()}


def experiment(
    data: Path,
    *,
    adapter: Adapter = LORA,
    dtype: Any = "float64",
    device: str = "cpu",
    work: Work = SGD,
    stages: Sequence[Stage] = (Uniform(),),
    ranks: Mapping[str, int] | None = None,
    **settings: Any,
) -> Experiment:
    """Two rounds of the five clients."""
    federation = Devices(str(data), partition=By("who"), heldout=0.0, ranks=tuple((ranks or {}).items()))
    return Experiment(
        task=Task(settings.pop("model", "tiny-llama"), adapter=adapter, dtype=dtype, device=device),
        federation=settings.pop("federation", federation),
        work=work,
        stages=tuple(stages),
        **{"evaluation": Evaluation(metrics=()), "rounds": 2, "seed": 4, **settings},
    )


@dataclass(eq=False)
class Watched(Engine):
    """An engine, remembering each answer in the order in which it came."""

    inner: Engine
    sent: dict[tuple[str, int, str], Update | Failure] = field(default_factory=dict)

    @contextmanager
    def open(self, experiment: Experiment, folder: Path | None, emit: Emit) -> Iterator[Call]:
        with self.inner.open(experiment, folder, emit) as call:

            def watched(name: str, requests: Mapping[str, Request]) -> Replies:
                for client, reply in call(name, requests):
                    self.sent[name, requests[client].ctx.round, client] = deepcopy(reply)  # it is the aggregator's own
                    yield client, reply

            yield watched


def sent(
    engine: Engine,
    made: Experiment,
    *,
    cohort: Sequence[str] = CLIENTS,
    told: list[Event] | None = None,
    rounds: int = 2,
) -> dict[tuple[int, str], Update | Failure]:
    """What each client of a cohort sends in some rounds, in which the server's parameters stay as they are."""
    found: dict[tuple[int, str], Update | Failure] = {}
    run = server_round.initial_state(made, begun(made))
    with engine.open(made, None, [].append if told is None else told.append) as call:
        for round in range(rounds):
            everyone = RoundContext(round, made.key, len(cohort), len(CLIENTS), made.rounds)
            requests = server_round.requests_for(made, replace(run, round=round), cohort, everyone)
            # nothing is added up here, so clients of unequal ranks may answer without a stage that makes them equal
            unasked = {client: replace(request, asks=not_known) for client, request in requests.items()}
            for client, reply in call("work", unasked):
                found[round, client] = deepcopy(reply)
    return found


def in_pieces(made: Experiment, out: Path, engine: Engine = SERIAL) -> launch.Result:
    """A run that is stopped when it is saved after 0, 1, 2, ... rounds, and resumed each time."""
    for stop_after in range(made.rounds):

        def stop(event: Event, rounds: int = stop_after) -> None:
            if isinstance(event, CheckpointSaved) and event.round == rounds:
                raise KeyboardInterrupt

        with pytest.raises(launch.Interrupted):
            launch.run(made, engine=engine, out=out, resume=stop_after > 0, listeners=[stop])
    return launch.run(made, engine=engine, out=out, resume=True)


def begun(made: Experiment) -> Tree:
    """Weights in the middle of a run: no factor is zero."""
    from fedllm.models.loaded_model import load

    generator = torch.Generator().manual_seed(7)
    fresh = load(made.task).initial_params(made.key)
    return {name: leaf + 0.02 * torch.randn(leaf.shape, generator=generator) for name, leaf in fresh.items()}


def delta(reply: Update | Failure) -> Tree:
    assert isinstance(reply, Update), reply
    return dict(reply.parts["delta"].tree)


def apart(found: Update | Failure, expected: Update | Failure) -> float:
    """2-norm of the difference of two deltas over the norm of the whole delta."""
    return tree.norm(tree.sub(delta(found), delta(expected))) / tree.norm(delta(expected))


def farthest(found: Mapping[Any, Update | Failure], expected: Mapping[Any, Update | Failure]) -> float:
    """The largest distance over the clients and rounds."""
    assert list(found) == list(expected), "other clients, or another order"
    return max(apart(found[key], expected[key]) for key in expected)


def same(found: Update | Failure, expected: Update | Failure) -> bool:
    """The same parts, weights and values, to the bit."""
    if isinstance(found, Failure) or isinstance(expected, Failure):
        return found == expected
    return found.parts.keys() == expected.parts.keys() and all(
        part.weight == expected.parts[name].weight and tree.equal(part.tree, expected.parts[name].tree)
        for name, part in found.parts.items()
    )


def memories(site: Site, made: Experiment, round: int) -> dict[str, list[str]]:
    """Digests of what the clients remember."""
    return {
        client: [tree.digest(memory) for memory in site.store.load(client, round, len(made.pipeline))]
        for client in CLIENTS
    }
