"""The server's side of a round, and the evaluation of its result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from time import perf_counter
from typing import Any

import torch

from fedllm.aggregators.base import Aggregator
from fedllm.errors import RoundVoid, RunError
from fedllm.events import ClientFailed, ClientFinished, Emit, RoundStarted
from fedllm.experiment.record import Experiment
from fedllm.messages.call import Call, Replies
from fedllm.messages.context import RoundContext, ServerContext
from fedllm.messages.traits import Fact
from fedllm.messages.update import Asked, Failure, Part, Request, Update
from fedllm.runs.expected_update import asked
from fedllm.runs.privacy_ledger import RoundNoise as RoundPrivacy
from fedllm.runs.state import ServerState
from fedllm.stages.round_trip import broadcast_all, decode_all
from fedllm.tensors import tree
from fedllm.tensors.base_delta import BaseDelta
from fedllm.tensors.tree import Tree

Figures = Mapping[str, float]
UpdateObserver = Callable[[Request, Update], None]  # (what a client was sent, its sealed update)


@dataclass(eq=False)
class ObservedCall:
    """A call that is watched: who answered, and the figures that each update carries in the clear."""

    call: Call
    emit: Emit
    round: int
    shown: bool  # False where the server must learn nothing but sums
    observe: UpdateObserver | None = None  # is shown each update; keeps copies of what it needs
    upload: str | None = None  # the call by which updates reach the sum, if it is another than the one asked for
    answered: list[str] = field(default_factory=list)
    scores: dict[str, Figures] = field(default_factory=dict)

    def __call__(self, name: str, requests: Mapping[str, Request]) -> Replies:
        """The replies, unchanged."""
        started = perf_counter()
        for client, reply in self.call(name, requests):
            if isinstance(reply, Failure):
                self.emit(ClientFailed(self.round, client, reply.reason, name))
            elif name in ("work", "evaluate"):
                self._note(name, client, reply, perf_counter() - started)
                if name == "work" and self.shown and self.observe is not None:
                    self.observe(requests[client], reply)
            if isinstance(reply, Update) and name in ((self.upload,) if self.upload else ("work", "evaluate")):
                self.answered.append(client)
            yield client, reply
            started = perf_counter()

    def refused(self, name: str, client: str, reason: str) -> None:
        """The aggregator leaves a reply out: its client is lost."""
        self.emit(ClientFailed(self.round, client, reason, name))
        if client in self.answered and name == self.upload:
            self.answered.remove(client)

    def _note(self, name: str, client: str, reply: Update, seconds: float) -> None:
        figures = _mean(reply, "metrics") if self.shown else {}
        counts = _mean(reply, "counts") if self.shown else {}
        if name == "evaluate":
            self.scores |= {client: {name: float(leaf) for name, leaf in figures.items()}} if self.shown else {}
        else:
            loss = float(figures["loss"]) if "loss" in figures else None
            tokens = int(counts["tokens"]) if "tokens" in counts else None
            self.emit(ClientFinished(self.round, client, loss, tokens, round(seconds, 4)))


@dataclass(frozen=True, eq=False)
class RoundResult:
    """What a round reports besides the new state. `cohort`: who was asked. `computed`: tokens, without what sequences
    had in common. `added`: to the frozen weights."""

    cohort: Sequence[str]
    clients: int
    loss: float | None
    tokens: int
    computed: int
    note: str
    added: Tree = field(default_factory=dict)

    def came_to(self, after: ServerState) -> Tree:
        """The parameters after the round, with what it has added to the frozen weights among their components."""
        return BaseDelta({after.round: self.added}).folded(after.params) if self.added else after.params


def run_round(
    run: ServerState,
    experiment: Experiment,
    clients: Sequence[str],
    call: Call,
    emit: Emit,
    observe: UpdateObserver | None = None,
    noise: RoundPrivacy | None = None,
) -> tuple[ServerState, RoundResult]:
    """Sample, ask, add up, decode, step. `observe` sees each update, unless the server must learn nothing but sums.
    `noise`: of a private experiment, its secret noise and its ledger."""
    stages = experiment.pipeline
    cohort = experiment.federation.sample(clients, run.round, run.key)
    emit(RoundStarted(run.round, tuple(cohort)))
    everyone = RoundContext(run.round, run.key, len(cohort), len(clients), experiment.rounds)
    aggregator = experiment.aggregator
    watch = ObservedCall(call, emit, run.round, not experiment.demands.secrecy, observe, aggregator.upload)
    requests = requests_for(experiment, run, cohort, everyone)
    if noise is not None:
        noise.asks(cohort, run.params)
    total, note = _added_up(experiment, watch, requests)
    expected = experiment.federation.expected_cohort(len(clients))
    known = ServerContext(**vars(everyone), expected=expected, noise=noise)
    try:
        total = empty_total(experiment, run, everyone) if note else total
        total, states = decode_all(stages, total, run.params, run.states, known)
    except RoundVoid as error:
        note = f"{error}: an empty round"
        total, states = decode_all(stages, empty_total(experiment, run, everyone), run.params, run.states, known)
    params = tree.add(run.params, total.parts["delta"].tree)
    after = replace(run, params=params, states=states, round=run.round + 1, pending=(), **_moved(run, total, watch))
    loss, counts = _tree(total, "metrics").get("loss"), _tree(total, "counts")
    result = RoundResult(
        cohort=cohort,
        clients=len(watch.answered),
        loss=None if loss is None or note else float(loss),
        tokens=int(counts.get("tokens", 0)),
        computed=int(counts.get("computed", 0)),
        note=note,
        added=_tree(total, "base_delta"),
    )
    return after, result


def _added_up(experiment: Experiment, watch: ObservedCall, requests: Mapping[str, Request]) -> tuple[Update, str]:
    """The total of the cohort, or why the round is empty."""
    try:
        total = experiment.aggregator.reduce(watch, requests)
    except RoundVoid as error:
        return Update({}), f"{error}: an empty round"
    if len(watch.answered) >= experiment.limits.quorum and total.parts:
        return total, ""
    count = f"{len(watch.answered)} of {len(requests)} answered: an empty round"
    return total, count if requests else "nobody was drawn"


def _moved(run: ServerState, total: Update, watch: ObservedCall) -> dict[str, Any]:
    """The frozen weights after the round, and what those who answered have of them."""
    added = _tree(total, "base_delta")
    seen = {**run.seen, **dict.fromkeys(watch.answered, run.base_delta.version)} if run.base_delta.version else run.seen
    return {"base_delta": run.base_delta.stepped(run.round + 1, added) if added else run.base_delta, "seen": seen}


@dataclass(frozen=True, eq=False)
class Requests(Mapping[str, Request]):
    """What each client of a cohort is sent, made when it is asked for: an evaluation asks all clients there are."""

    experiment: Experiment
    run: ServerState
    slots: Mapping[str, int]  # by client
    everyone: RoundContext
    scores: Tree | None = None  # the sums over no records, where the clients evaluate
    missed: dict[int, BaseDelta] = field(default_factory=dict)  # the one that was last sent, by the version before it
    known: dict[str, Asked | None] = field(default_factory=dict)  # what is asked for, by call, once it was needed

    def __getitem__(self, client: str) -> Request:
        profile = self.experiment.federation.profile(client)
        ctx = replace(self.everyone, client=client, slot=self.slots[client], profile=profile)
        sent = broadcast_all(self.experiment.pipeline, self.run.params, self.run.states, ctx)
        request = Request(*sent, ctx, self._missed(self.run.seen.get(client, 0)))
        return replace(request, asks=partial(self._asked, request))

    def __iter__(self) -> Iterator[str]:
        return iter(self.slots)

    def __len__(self) -> int:
        return len(self.slots)

    def _asked(self, request: Request, call: str) -> Asked | None:
        """The same for all clients."""
        scores = self.scores if call == "evaluate" else None
        sealed = type(self.experiment.aggregator).seal is not Aggregator.seal
        if sealed or (call != "work" and scores is None):
            return None
        if call not in self.known:
            self.known[call] = asked(self.experiment, request, self.run.params, scores)
        return self.known[call]

    def _missed(self, version: int) -> BaseDelta:
        """What was added behind a version; a whole sum takes long, and most clients have the same version."""
        last = self.missed.get(version)
        if last is None:
            last = self.run.base_delta.since(version)
            self.missed.clear()
            self.missed[version] = last
        return last


def requests_for(
    experiment: Experiment, run: ServerState, cohort: Sequence[str], everyone: RoundContext, scores: Tree | None = None
) -> Requests:
    """What each client of the cohort is sent. `scores`: of an evaluation, the sums over no records."""
    return Requests(experiment, run, {client: slot for slot, client in enumerate(cohort)}, everyone, scores)


def empty_total(experiment: Experiment, run: ServerState, everyone: RoundContext) -> Update:
    """A zero delta of weight 0 in the shape of the broadcast; without tensors where clients send another shape. Where
    noise is added, zeros in place of all that clients would have sent: an empty round looks like any other."""
    stages = experiment.pipeline
    if experiment.private:
        sent = broadcast_all(stages, run.params, run.states, everyone)
        forms = asked(experiment, Request(*sent, everyone), run.params)
        if forms is None:
            raise RunError(
                "a round without answers needs noise, and nobody knows in which shapes; leave out custom stages"
            )
        return Update(
            {name: Part({n: torch.zeros(shape, dtype=dtype) for n, (dtype, shape) in of.items()}, 0.0)
             for name, of in forms.items()}
        )  # fmt: skip
    if any(Fact.SHAPE in stage.traits.loses for stage in stages):
        return Update({"delta": Part({}, 0.0)})
    params, _ = broadcast_all(stages, run.params, run.states, everyone)
    return Update({"delta": Part(tree.zeros_like(params), 0.0)})


def evaluate(
    run: ServerState, experiment: Experiment, clients: Sequence[str], call: Call, emit: Emit, scores: Tree | None = None
) -> tuple[Tree, dict[str, Figures]]:
    """Ask all clients for the scores of the current parameters: their sums in all, and by client where shown.

    Its round is the number of complete rounds: clients answer with what they remember after them. `scores`: the sums
    over no records, which say what a reply may hold; None: this is not known.
    """
    everyone = RoundContext(run.round, run.key.fold("evaluate"), len(clients), len(clients), experiment.rounds)
    watch = ObservedCall(call, emit, run.round, not experiment.demands.secrecy)
    requests = requests_for(experiment, run, clients, everyone, scores)
    total = experiment.aggregator.reduce(watch, requests, name="evaluate")
    total, _ = decode_all(experiment.pipeline, total, run.params, run.states, everyone)
    return _tree(total, "metrics"), watch.scores


def initial_state(experiment: Experiment, initial: Tree) -> ServerState:
    """The state before the first round."""
    shared = {name: leaf for name, leaf in initial.items() if experiment.task.scope.shares(name)}
    return ServerState(
        params=tree.flatten(shared), states=tuple({} for _ in experiment.pipeline), round=0, key=experiment.key
    )


def _tree(update: Update, part: str) -> Tree:
    found = update.parts.get(part)
    return {} if found is None else found.tree


def _mean(update: Update, part: str) -> Tree:
    """A part of a sealed update, divided by the weight that it was multiplied with."""
    found = update.parts.get(part)
    if found is None:
        return {}
    return found.tree if not found.weight else tree.scale(found.tree, 1 / found.weight)
