"""The client side of the trip, the same on every engine and on every site.

    request -> receive (reverse order) -> work -> encode (in order) -> seal -> update

`prepare` and `conclude` are the two halves around the local work, so that an engine may put several clients' jobs into
one stack. An evaluation takes the same path and saves no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from fedllm import tree
from fedllm.aggregate import Session
from fedllm.batch import Example
from fedllm.errors import ClientError, FedllmError, RunError, nearest
from fedllm.evaluation.scores import Scorer
from fedllm.experiment import Experiment
from fedllm.federation import Population
from fedllm.recent import Recent
from fedllm.stage import Arrival, adjust, arrive, up
from fedllm.state import ClientStore
from fedllm.tasks.model import LoadedModel
from fedllm.tree import Tree
from fedllm.update import Ctx, Failure, Local, Part, Request, Update
from fedllm.work import Job, Outcome, run_work

MOST_TOKENS = 1_000_000  # of the encoded examples that a process keeps: 16 MB, and some more for short ones


@dataclass(frozen=True, eq=False)
class Prepared:
    """A client between receiving and sending."""

    client: str
    job: Job
    arrival: Arrival
    memories: tuple[Tree, ...]
    local: Local


@dataclass(eq=False)
class Site:
    """What the clients of one process share: the loaded model, their data and memories, and open sessions."""

    experiment: Experiment
    model: LoadedModel
    population: Population
    store: ClientStore
    sessions: dict[str, Session] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model = self.model.bound(self.experiment.key)
        self.stages = self.experiment.trip
        self.fresh = self.model.fresh(self.experiment.key)
        self.scorer = Scorer.of(self.experiment, self.population)
        self.examples = Recent(self._examples, _num_tokens, MOST_TOKENS)

    def answer(self, name: str, request: Request) -> Update | Failure:
        """One call to one client. What goes wrong on a client is its failure, not the round's."""
        client, ctx = str(request.ctx.client), request.ctx
        reason = self.experiment.federation.failure(client, ctx.round, name, ctx.key)
        if reason is not None:
            return Failure(client, ctx.round, reason)
        own: dict[str, Callable[[Request], Update | Failure]] = {"work": self.work, "evaluate": self.evaluate}
        others = self.experiment.aggregator.handlers()
        try:
            if name in own:
                return own[name](request)
            if name not in others:
                raise ClientError(f"a client has no answer to the call '{name}'{nearest(name, [*own, *others])}")
            return others[name](request, self.session(ctx))
        except RunError:  # the disk of this process: no client has failed
            raise
        except FedllmError as error:
            return Failure(client, ctx.round, str(error))

    def work(self, request: Request) -> Update | Failure:
        """Train: a stack of one."""
        prepared = self.prepare(request)
        (outcome,) = run_work(self.experiment.work, [prepared.job], self.model)
        return self.conclude(prepared, outcome)

    def prepare(self, request: Request) -> Prepared:
        """Receive: from a request to a job."""
        return self._prepared(request, self.examples(str(request.ctx.client)))

    def _prepared(self, request: Request, examples: Sequence[Example]) -> Prepared:
        client, ctx = str(request.ctx.client), request.ctx
        memories = self.store.load(client, ctx.round, len(self.stages))
        local = Local(ctx, fresh=self.fresh)
        params, arrival = arrive(self.stages, request.params, request.extras, memories, local)
        start = {name: params.get(name, leaf) for name, leaf in self.fresh.items()}
        # encode and the memories stay on the CPU; what the local steps touch moves to the model
        device = self.model.device
        there = replace(arrival, scratch=tuple(tree.to(scratch, device) for scratch in arrival.scratch))
        job = Job(
            ctx=ctx,
            start=tree.to(start, device),
            examples=examples,
            adjust=lambda grads, params: adjust(self.stages, there, grads, params),
        )
        return Prepared(client, job, arrival, memories, local)

    def conclude(self, prepared: Prepared, outcome: Outcome) -> Update | Failure:
        """Send: from what the work made to a sealed update; the client's memories are saved."""
        ctx = prepared.local.ctx
        if isinstance(outcome, str):
            return Failure(prepared.client, ctx.round, outcome)
        made, facts = outcome
        update = Update({name: replace(part, tree=tree.to(part.tree, "cpu")) for name, part in made.parts.items()})
        local = replace(prepared.local, facts={**facts, "examples": float(len(prepared.job.examples))})
        update, memories = up(self.stages, update, prepared.arrival, prepared.memories, local)
        sealed = self.experiment.aggregator.seal(update, self.session(ctx))
        self.store.save(prepared.client, ctx.round + 1, memories)
        return sealed

    def evaluate(self, request: Request) -> Update:
        """Score the parameters on the client's held-out records."""
        prepared = self._prepared(request, ())
        sums = self.scorer.sums(self.model, prepared.job.start, self.population.heldout[prepared.client])
        update = Update({"metrics": Part(sums, 0.0)})
        local = replace(prepared.local, facts={"examples": 1.0, "steps": 0.0, "lr_sum": 0.0, "tokens": 0.0})
        update, _ = up(self.stages, update, prepared.arrival, prepared.memories, local)
        return self.experiment.aggregator.seal(update, self.session(request.ctx))

    def session(self, ctx: Ctx) -> Session:
        """The client's session of this round; those of an earlier one are dropped."""
        held = next(iter(self.sessions.values()), None)
        if held is not None and (held.ctx.round, held.ctx.key) != (ctx.round, ctx.key):
            self.sessions.clear()
        return self.sessions.setdefault(str(ctx.client), Session(ctx))

    def _examples(self, client: str) -> tuple[Example, ...]:
        max_length = self.experiment.work.max_length
        encoded = (self.model.encode(record, max_length) for record in self.population.train[client])
        return tuple(example for example in encoded if example is not None)


def _num_tokens(examples: Sequence[Example]) -> int:
    return sum(len(example.tokens) for example in examples)
