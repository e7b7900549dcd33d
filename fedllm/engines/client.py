"""The client's half of a round, the same on every engine and on every site.

    request -> receive (reverse order) -> work -> encode (in order) -> seal -> update

`prepare` and `conclude` are the two halves around the local work, so that an engine may put several clients' jobs into
one stack. An evaluation takes the same path and saves no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TypeVar

from fedllm.aggregators.base import ClientSession
from fedllm.aggregators.keyring import FOLDER, Keyring
from fedllm.data.federation import Population
from fedllm.engines.base_model_versions import BaseDeltaStore, BaseModelVersions
from fedllm.engines.client_noise import FILE, RoundStreams, key_file, seeded_key
from fedllm.engines.client_store import ClientStore
from fedllm.engines.lru_cache import SizedLRUCache
from fedllm.errors import ClientError, FedllmError, RunError, nearest
from fedllm.evaluation.scores import Scorer
from fedllm.experiment.record import Experiment
from fedllm.messages.context import ClientContext, RoundContext
from fedllm.messages.update import Failure, Part, Request, Update, sent_hash
from fedllm.models.batch import Example, spared
from fedllm.models.loaded_model import LoadedModel, load
from fedllm.privacy.noise import new_key
from fedllm.stages.round_trip import Received, adjust_grads, changes_gradients, encode_all, receive_all
from fedllm.tensors import tree
from fedllm.tensors.tree import Tree
from fedllm.training.base import ClientFacts, ClientJob, Outcome
from fedllm.training.phases import run_phases

Found = TypeVar("Found")

MOST_TOKENS = 1_000_000  # of the encoded examples that a process keeps: 16 MB, and some more for short ones


@dataclass(frozen=True, eq=False)
class Prepared:
    """A client between receiving and sending."""

    client: str
    job: ClientJob
    arrival: Received
    memories: tuple[Tree, ...]
    local: ClientContext
    model: LoadedModel
    sent: bytes = b""  # hash of the request, where the aggregator asks for more than the work


@dataclass(eq=False)
class Site:
    """What the clients of one process share: the loaded model, their data and memories, and open sessions."""

    experiment: Experiment
    model: LoadedModel
    population: Population
    store: ClientStore
    base_deltas: BaseDeltaStore = field(default_factory=lambda: BaseDeltaStore(None))
    sessions: dict[str, ClientSession] = field(default_factory=dict)
    noise_key: bytes | None = None  # of clients that add noise; it never leaves the site
    keyring: Keyring = field(default_factory=Keyring)  # secrets of the clients, for aggregators that hide updates
    tell: Callable[[str], str] = str  # what the server is told of an error: by default its text

    def __post_init__(self) -> None:
        self.train: Callable[[Sequence[ClientJob], LoadedModel], Sequence[Outcome]] = self._train
        self.model = self.model.with_constants(self.experiment.key)
        self.base_versions = BaseModelVersions(self.model, self.base_deltas)
        self.lock = Lock()  # clients may be answered side by side
        self.talks = bool(self.experiment.aggregator.handlers())
        self.stages = self.experiment.pipeline
        self.fresh = self.model.initial_params(self.experiment.key)
        self.scorer = Scorer.of(self.experiment.evaluation, self.experiment.work.max_length, self.population)
        self.examples = SizedLRUCache(self._examples, _num_tokens, MOST_TOKENS)

    @staticmethod
    def of(
        experiment: Experiment, folder: Path | None, model: LoadedModel | None = None, client: str | None = None
    ) -> Site:
        """Load the task, unless `model` is it, and the clients' data; or of one client alone.

        `folder` holds the clients' memories; None keeps them in this process.

        Raises:
            DataError: there is no such client.
        """
        keep = experiment.limits.keep_last * experiment.limits.checkpoint_every
        data, store = experiment.federation.load(experiment.key), ClientStore(folder, keep)
        data = data if client is None else data.of(client)
        shifts, key = BaseDeltaStore(folder, keep), noise_key(experiment, folder)
        keyring = Keyring(None if folder is None else folder.parent / FOLDER)
        keyring.check()
        return Site(experiment, model or load(experiment.task), data, store, shifts, noise_key=key, keyring=keyring)

    def answer(self, name: str, request: Request) -> Update | Failure:
        """One call to one client."""
        (answer,) = self.answers(name, [request])
        return answer

    def answers(self, name: str, requests: Sequence[Request]) -> list[Update | Failure]:
        """One call to several clients; those that train do so in one stack.

        What goes wrong on a client is its failure, not the round's.
        """
        if name == "work":
            return self._work(requests)
        return [self._guarded(request, name, partial(self._other, name, request)) for request in requests]

    def _work(self, requests: Sequence[Request]) -> list[Update | Failure]:
        prepared = [self._guarded(request, "work", partial(self.prepare, request)) for request in requests]
        ready = [found for found in prepared if isinstance(found, Prepared)]
        outcomes = iter(self.train([found.job for found in ready], ready[0].model) if ready else ())
        return [found if isinstance(found, Failure) else self._concluded(found, next(outcomes)) for found in prepared]

    def _train(self, jobs: Sequence[ClientJob], model: LoadedModel) -> Sequence[Outcome]:
        return run_phases(self.experiment.work, jobs, model)

    def _other(self, name: str, request: Request) -> Update:
        if name == "evaluate":
            return self.evaluate(request)
        handlers = self.experiment.aggregator.handlers()
        if name not in handlers:
            known = nearest(name, ["work", "evaluate", *handlers])
            raise ClientError(f"a client has no answer to the call '{name}'{known}")
        return handlers[name](request, self.session(request.ctx))

    def _guarded(self, request: Request, name: str, action: Callable[[], Found]) -> Found | Failure:
        client, ctx = str(request.ctx.client), request.ctx
        reason = self.experiment.federation.failure(client, ctx.round, name, ctx.key)
        if reason is not None:
            return Failure(client, ctx.round, reason)
        return self._failing(ctx, action)

    def _concluded(self, prepared: Prepared, outcome: Outcome) -> Update | Failure:
        if isinstance(outcome, str):
            return Failure(prepared.client, prepared.local.ctx.round, self.tell(outcome))
        return self._failing(prepared.local.ctx, partial(self.conclude, prepared, outcome))

    def _failing(self, ctx: RoundContext, action: Callable[[], Found]) -> Found | Failure:
        """What an action finds, or the client's failure."""
        try:
            return action()
        except RunError:  # the disk of this process: no client has failed
            raise
        except FedllmError as error:
            return Failure(str(ctx.client), ctx.round, self.tell(str(error)))

    def prepare(self, request: Request) -> Prepared:
        """Receive: from a request to a job."""
        return self._prepared(request, self.examples(str(request.ctx.client)))

    def _prepared(self, request: Request, examples: Sequence[Example]) -> Prepared:
        client, ctx, model = str(request.ctx.client), request.ctx, self.base_versions.model(request)
        memories = self.store.load(client, ctx.round, len(self.stages))
        noise = None if self.noise_key is None else RoundStreams(self.noise_key, ctx)
        local = ClientContext(ctx, initial_params=self.fresh, noise=noise)
        params, arrival = receive_all(self.stages, request.params, request.extras, memories, local)
        start, held = self._split(tree.overlay(self.fresh, params), ctx.round)
        # encode and the memories stay on the CPU; what the local steps touch moves to the model
        device = self.model.device
        there = replace(arrival, scratch=tuple(tree.to(scratch, device) for scratch in arrival.scratch))
        job = ClientJob(
            ctx=ctx,
            initial=tree.to(start, device),
            examples=examples,
            adjust=(lambda grads, params: adjust_grads(self.stages, there, grads, params))
            if changes_gradients(self.stages)
            else None,
            frozen=tree.to(held, device),
            noise=noise,
            phases=self.experiment.task.scope.phases,
        )
        sent = sent_hash(request) if self.talks else b""
        return Prepared(client, job, arrival, memories, local, model, sent)

    def _split(self, params: Tree, round: int) -> tuple[Tree, Tree]:
        """The tensors that train in a round, and the others."""
        moves = self.experiment.trains_in_round
        held = {name: params[name] for name in params if not moves(name, round)}
        start = {name: leaf for name, leaf in params.items() if name not in held} if held else params
        return tree.flatten(start), held

    def first_job(self, client: str) -> ClientJob:
        """What a client will have to do in a round, for estimates: the first round, from the initial values."""
        return ClientJob(self._first(client), self.fresh, self.examples(client))

    def tokens(self, ctx: RoundContext) -> int:
        """Tokens that a client will compute in its round; 0 if its data cannot be had, which it says when asked."""
        return sum(self._batch_tokens(ctx))

    def batch_tokens(self, clients: Iterable[str]) -> float:
        """Mean of the tokens that some clients compute in a micro-batch of the first round; 0 if they have none."""
        counts = [count for client in clients for count in self._batch_tokens(self._first(client))]
        return sum(counts) / len(counts) if counts else 0.0

    def _first(self, client: str) -> RoundContext:
        profile = self.experiment.federation.profile(client)
        return RoundContext(0, self.experiment.key, 1, 1, client=client, profile=profile)

    def _batch_tokens(self, ctx: RoundContext) -> Iterator[int]:
        """Of each micro-batch of a client's round; none if its data cannot be had."""
        try:
            examples = self.examples(str(ctx.client))
        except FedllmError:
            return
        for step in self.experiment.work.for_profile(ctx.profile).plan(len(examples), ctx):
            for indices in step:
                batch = [examples[index] for index in indices]
                yield _num_tokens(batch) - (spared(batch) if self.model.shares_prefixes else 0)

    def conclude(self, prepared: Prepared, outcome: tuple[Update, ClientFacts]) -> Update:
        """Send: from what the work made to a sealed update; the client's memories are saved."""
        ctx, (made, facts) = prepared.local.ctx, outcome
        update = Update({name: replace(part, tree=tree.to(part.tree, "cpu")) for name, part in made.parts.items()})
        local = replace(prepared.local, facts={**facts, "examples": float(len(prepared.job.examples))})
        update, memories = encode_all(self.stages, update, prepared.arrival, prepared.memories, local)
        sealed = self.experiment.aggregator.seal(update, self.session(ctx, prepared.sent))
        self.store.save(prepared.client, ctx.round + 1, memories)
        return sealed

    def evaluate(self, request: Request) -> Update:
        """Score the parameters on the client's held-out records."""
        prepared = self._prepared(request, ())
        sums = self.scorer.sums(
            prepared.model, {**prepared.job.frozen, **prepared.job.initial}, self.population.heldout[prepared.client]
        )
        update = Update({"metrics": Part(sums, 0.0)})
        local = replace(prepared.local, facts={"examples": 1.0, "steps": 0.0, "lr_sum": 0.0, "tokens": 0.0})
        update, _ = encode_all(self.stages, update, prepared.arrival, prepared.memories, local)
        return self.experiment.aggregator.seal(update, self.session(request.ctx, prepared.sent))

    def session(self, ctx: RoundContext, sent: bytes = b"") -> ClientSession:
        """The client's session of this round; those of an earlier one are dropped. Where an aggregator asks only once
        none is kept: an evaluation asks all clients there are. `sent`: hash of what the client was sent."""
        if not self.talks:
            return ClientSession(ctx)
        with self.lock:
            held = next(iter(self.sessions.values()), None)
            if held is not None and (held.ctx.round, held.ctx.key) != (ctx.round, ctx.key):
                self.sessions.clear()
            found = self.sessions.setdefault(str(ctx.client), ClientSession(ctx, keyring=self.keyring))
            found.sent = sent or found.sent
            return found

    def _examples(self, client: str) -> tuple[Example, ...]:
        max_length = self.experiment.work.max_length
        encoded = self.model.encode_all(self.population.train[client], max_length)
        return tuple(example for example in encoded if example is not None)


def noise_key(experiment: Experiment, folder: Path | None) -> bytes | None:
    """The secret key of clients that may have to add noise: in their folder, or of this process. None: nobody adds any.

    Raises:
        RunError: its file cannot be used.
    """
    demand = experiment.demands.privacy
    if not experiment.private:
        return None
    if demand is not None and demand.seeded_noise:
        return seeded_key(experiment.key)
    return new_key() if folder is None else key_file(folder / FILE)


def _num_tokens(examples: Sequence[Example]) -> int:
    return sum(len(example.tokens) for example in examples)
