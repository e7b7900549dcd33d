"""One round of the server: who counts, what an empty round is, and what the stages make of it. No model is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from fedllm.aggregators.base import Aggregator
from fedllm.aggregators.sum import Sum
from fedllm.data.federation import Federation, Population
from fedllm.events import ClientFailed, ClientFinished, Event, RoundStarted
from fedllm.experiment.record import Demands, Experiment, Limits
from fedllm.messages.call import Call, Replies
from fedllm.messages.context import RoundContext
from fedllm.messages.update import Failure, Part, Request, Update
from fedllm.models.task import Scope, Task
from fedllm.rng import Key
from fedllm.runs import server_round
from fedllm.runs.state import ServerState
from fedllm.stages.base import Stage
from fedllm.stages.personalization.keep import Keep
from fedllm.stages.server_optimizers.adam import Adam
from fedllm.stages.server_optimizers.momentum import Momentum
from fedllm.stages.weighting.by_examples import ByExamples
from fedllm.stages.weighting.uniform import Uniform
from fedllm.tensors.tree import Tree
from fedllm.training.sgd import Sgd

CLIENTS = ("a", "b", "c")


@dataclass(frozen=True)
class Listed(Federation):
    """The cohort of each round, written down."""

    cohorts: tuple[tuple[str, ...], ...]

    def load(self, key: Key) -> Population:
        return Population({client: [] for client in CLIENTS}, {})

    def sample(self, clients: Sequence[str], round: int, key: Key) -> Sequence[str]:
        return self.cohorts[round]


@dataclass(frozen=True)
class Look(Stage):
    """Remembers what its decode was given."""

    seen: list[Update] = field(default_factory=list, compare=False)

    def decode(self, total: Update, params: Tree, state: Tree, ctx: RoundContext) -> tuple[Update, Tree]:
        self.seen.append(total)
        return total, state


def experiment(*stages: Stage, cohorts: Sequence[str] = ("abc",), **settings: Any) -> Experiment:
    return Experiment(
        task=Task("none", scope=settings.pop("scope", Scope())),
        federation=Listed(tuple(tuple(cohort) for cohort in cohorts)),
        work=Sgd(steps=1),
        stages=stages,
        rounds=len(cohorts),
        **settings,
    )


def answers(weighted: Mapping[str, tuple[float, float]], calls: list[str] | None = None) -> Call:
    """Client -> (weight, delta of every value); whoever is not in it fails."""

    def call(name: str, requests: Mapping[str, Request]) -> Replies:
        for client, request in requests.items():
            if calls is not None:
                calls.append(client)
            if client not in weighted:
                yield client, Failure(client, request.ctx.round, "no power")
                continue
            weight, delta = weighted[client]
            delta_tree = {name: torch.full_like(leaf, weight * delta) for name, leaf in request.params.items()}
            loss = {"loss": torch.tensor(weight * delta * 10, dtype=torch.float64)}
            counts = {"tokens": torch.tensor(7.0, dtype=torch.float64)}
            parts = {"delta": Part(delta_tree, weight), "metrics": Part(loss, weight), "counts": Part(counts, 0.0)}
            yield client, Update(parts)

    return call


def begun(made: Experiment, **leaves: float) -> ServerState:
    named = leaves or {"w": 1.0}
    return server_round.initial_state(
        made, {name: torch.full((2, 3), value, dtype=torch.float64) for name, value in named.items()}
    )


def played(
    made: Experiment, call: Call, run: ServerState | None = None, rounds: int = 1
) -> tuple[ServerState, list[server_round.RoundResult], list[Event]]:
    told: list[Event] = []
    results = []
    run = run or begun(made)
    for _ in range(rounds):
        run, result = server_round.run_round(run, made, CLIENTS, call, told.append)
        results.append(result)
    return run, results, told


def value(run: ServerState, leaf: str = "w") -> float:
    (only,) = run.params[leaf].unique().tolist()
    return float(only)


def test_the_mean_is_over_those_who_answered() -> None:
    run, (result,), told = played(experiment(ByExamples()), answers({"a": (3, 1.0), "c": (1, 5.0)}))
    assert value(run) == 1 + (3 * 1 + 1 * 5) / (3 + 1)
    assert (result.clients, result.tokens, result.note) == (2, 14, "")
    assert result.loss == pytest.approx((3 * 10 + 1 * 50) / 4)
    assert told[0] == RoundStarted(0, CLIENTS)
    assert [event for event in told if isinstance(event, ClientFailed)] == [ClientFailed(0, "b", "no power")]
    losses = {event.client: event.loss for event in told if isinstance(event, ClientFinished)}
    assert losses == {"a": 10, "c": 50}, "each client's own, not weighted"


def test_weights_are_by_hand() -> None:
    run, _, _ = played(experiment(ByExamples()), answers({"a": (3, 1.0), "b": (4, -2.0), "c": (1, 5.0)}))
    assert value(run) == 1 + (3 * 1 - 4 * 2 + 1 * 5) / 8
    run, _, _ = played(experiment(Uniform()), answers({"a": (1, 1.0), "b": (1, -2.0), "c": (1, 5.0)}))
    assert value(run) == pytest.approx(1 + 4 / 3, abs=1e-15)


def test_nobody_drawn_is_a_round_of_zeros() -> None:
    look = Look()
    calls: list[str] = []
    made = experiment(look, ByExamples(), cohorts=["", "ab"])
    run, results, told = played(made, answers({"a": (1, 1.0), "b": (1, 1.0)}, calls), rounds=2)
    assert calls == ["a", "b"]
    (delta,) = look.seen[0].parts.values()
    assert delta.weight == 0
    assert delta.tree.keys() == {"w"} and delta.tree["w"].shape == (2, 3) and delta.tree["w"].dtype == torch.float64
    assert not delta.tree["w"].any()
    assert told[0] == RoundStarted(0, ())
    assert (results[0].clients, results[0].loss, results[0].tokens) == (0, None, 0)
    assert results[0].note == "nobody was drawn"
    assert results[1].note == ""
    assert value(run) == 2.0 and run.round == 2


def test_momentum_moves_on_in_an_empty_round() -> None:
    made = experiment(Momentum(beta=0.8, server_lr=0.5), ByExamples(), cohorts=["abc", "", ""])
    run, results, _ = played(made, answers({"a": (3, 1.0), "c": (1, 5.0)}), rounds=3)
    velocity, expected = 0.0, 1.0
    for mean in (2.0, 0.0, 0.0):
        velocity = 0.8 * velocity + 0.2 * mean
        expected += 0.5 * velocity
    assert value(run) == pytest.approx(expected, rel=1e-15)
    assert velocity > 0
    assert [result.note for result in results] == ["", "nobody was drawn", "nobody was drawn"]


@pytest.mark.parametrize("weigher", [ByExamples(), Uniform(), Uniform("cohort")])
def test_adam_moves_on_in_an_empty_round(weigher: Stage) -> None:
    made = experiment(Adam(beta1=0.9, beta2=0.5, tau=0.1, server_lr=0.2), weigher, cohorts=["a", "", ""])
    run, _, _ = played(made, answers({"a": (1, 3.0)}), rounds=3)
    m, v, expected = 0.0, 0.1**2, 1.0
    for mean in (3.0, 0.0, 0.0):
        m, v = 0.9 * m + 0.1 * mean, 0.5 * v + 0.5 * mean**2
        expected += 0.2 * m / (math.sqrt(v) + 0.1)
    assert value(run) == pytest.approx(expected, rel=1e-14)


def test_an_empty_round_has_the_shape_of_the_broadcast() -> None:
    look = Look()
    made = experiment(Keep(("*B",)), look, ByExamples(), cohorts=[""])
    run, _, _ = played(made, answers({}), begun(made, layer_A=1.0, layer_B=2.0))
    assert look.seen[0].parts["delta"].tree.keys() == {"layer_A"}
    assert (value(run, "layer_A"), value(run, "layer_B")) == (1.0, 2.0)


@pytest.mark.parametrize(("quorum", "expected"), [(1, 3.0), (2, 3.0), (3, 1.0)])
def test_a_round_needs_its_quorum(quorum: int, expected: float) -> None:
    made = experiment(ByExamples(), limits=Limits(quorum=quorum))
    run, (result,), _ = played(made, answers({"a": (3, 1.0), "c": (1, 5.0)}))
    assert value(run) == expected
    assert run.round == 1
    missed = quorum == 3
    assert result.note == ("2 of 3 answered: an empty round" if missed else "")
    assert (result.loss is None) == missed


def test_all_clients_may_fail() -> None:
    run, (result,), told = played(experiment(Momentum(), ByExamples()), answers({}))
    assert value(run) == 1.0
    assert result.note == "0 of 3 answered: an empty round"
    assert [event.client for event in told if isinstance(event, ClientFailed)] == list(CLIENTS)
    assert torch.equal(run.states[0]["w"], torch.zeros(2, 3, dtype=torch.float64)), "momentum has begun, from nothing"


def test_requests_carry_the_facts_of_the_step() -> None:
    asked: dict[str, Request] = {}

    def call(name: str, requests: Mapping[str, Request]) -> Replies:
        asked.update(requests)
        return iter(())

    made = experiment(ByExamples(), cohorts=["", "ca"])
    run, _, _ = played(made, call, rounds=2)
    assert list(asked) == ["c", "a"]
    assert [(r.ctx.client, r.ctx.slot, r.ctx.round, r.ctx.cohort) for r in asked.values()] == [
        ("c", 0, 1, 2),
        ("a", 1, 1, 2),
    ]
    assert {(r.ctx.population, r.ctx.rounds, r.ctx.key) for r in asked.values()} == {(3, 2, made.key)}
    assert run.round == 2


def test_only_what_is_shared_is_on_the_server() -> None:
    made = experiment(ByExamples(), scope=Scope(share=("*A",)))
    assert begun(made, layer_A=1.0, layer_B=2.0).params.keys() == {"layer_A"}


@dataclass(frozen=True)
class Backwards(Aggregator):
    """Asks twice: keys first, then the work."""

    def reduce(self, call: Call, requests: Mapping[str, Request], name: str = "work") -> Update:
        assert [client for client, _ in call("keys", requests)] == list(requests)
        return Sum().reduce(call, requests, name)


def test_further_calls_are_no_answers_to_the_work() -> None:
    made = experiment(ByExamples(), aggregator=Backwards(), limits=Limits(quorum=3))
    run, (result,), told = played(made, answers({client: (1, 2.0) for client in CLIENTS}))
    assert (result.clients, result.note, value(run)) == (3, "", 3.0)
    assert [event.client for event in told if isinstance(event, ClientFinished)] == list(CLIENTS)


def test_under_secrecy_no_client_s_figures_are_shown() -> None:
    made = experiment(ByExamples(), demands=Demands(secrecy=True))
    _, (result,), told = played(made, answers({"a": (3, 1.0)}))
    assert [(e.loss, e.tokens) for e in told if isinstance(e, ClientFinished)] == [(None, None)]
    assert result.loss == 10


def scores(of: Mapping[str, float]) -> Callable[[str, Mapping[str, Request]], Replies]:
    def call(name: str, requests: Mapping[str, Request]) -> Replies:
        assert name == "evaluate"
        for client, request in requests.items():
            if client in of:
                leaves = {"sum/nll": of[client], "count/nll": 2.0}
                tree = {key: torch.tensor(leaf, dtype=torch.float64) for key, leaf in leaves.items()}
                yield client, Update({"metrics": Part(tree, 0.0)})
            else:
                yield client, Failure(client, request.ctx.round, "away")

    return call


def test_evaluation_adds_up_over_all_clients_and_changes_nothing() -> None:
    made = experiment(Momentum(), ByExamples(), cohorts=["a"])
    run = begun(made)
    told: list[Event] = []
    total, clients = server_round.evaluate(run, made, CLIENTS, scores({"a": 3.0, "c": 5.0}), told.append)
    assert {name: float(leaf) for name, leaf in total.items()} == {"sum/nll": 8.0, "count/nll": 4.0}
    assert {client: float(sums["sum/nll"]) for client, sums in clients.items()} == {"a": 3.0, "c": 5.0}
    assert told == [ClientFailed(0, "b", "away", "evaluate")]
    assert run.states == ({}, {})
    none, nobody = server_round.evaluate(run, made, CLIENTS, scores({}), told.append)
    assert (none, nobody) == ({}, {})


def test_under_secrecy_scores_are_sums_alone() -> None:
    made = experiment(ByExamples(), demands=Demands(secrecy=True))
    total, clients = server_round.evaluate(
        begun(made), made, CLIENTS, scores(dict.fromkeys(CLIENTS, 1.0)), lambda event: None
    )
    assert float(total["sum/nll"]) == 3.0
    assert clients == {}
