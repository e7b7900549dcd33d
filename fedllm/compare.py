"""What a run is held against: the base model, each client alone, and the pooled data.

    local_only    each client by itself: rounds x steps of its own batches, optimiser kept
    centralised   the pooled data: rounds x steps of batch size x cohort, optimiser kept

Each at the run's own learning rate, or at the best of `compare_lr` by loss on held-out records. A figure is cached by
the hash of what it depends on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import fedllm
from fedllm.batch import Example
from fedllm.cache import cache_dir
from fedllm.config import dump
from fedllm.errors import RunError
from fedllm.evaluation.scores import Scorer
from fedllm.events import Emit, Evaluated, Progress
from fedllm.experiment import Experiment
from fedllm.federation import Population, Record
from fedllm.state import write_durably
from fedllm.tasks.model import LoadedModel
from fedllm.tree import Tree, add
from fedllm.update import Ctx
from fedllm.work import Job, Work, run_steps

Scores = dict[str, float]


@dataclass(frozen=True, eq=False)
class Comparison:
    """Trains and scores without a federation, in this process."""

    experiment: Experiment
    model: LoadedModel
    population: Population
    emit: Emit

    @property
    def scorer(self) -> Scorer:
        """The run's own."""
        return Scorer.of(self.experiment, self.population)

    @property
    def heldout(self) -> list[Record]:
        """All clients' held-out records."""
        return [record for records in self.population.heldout.values() for record in records]

    def base(self) -> Evaluated:
        """The base model without an adapter."""
        clients = {c: self._scores(self.model, {}, records) for c, records in self.population.heldout.items()}
        return Evaluated("base", 0, self._scores(self.model, {}, self.heldout), clients)

    def local_only(self) -> Evaluated:
        """The mean over clients, on all held-out records; `own/...` on the client's own."""
        clients: dict[str, Scores] = {}
        notes: dict[str, float] = {}
        for done, client in enumerate(self.population.clients):
            self.emit(Progress("local_only", done, len(self.population.clients)))
            clients[client], notes[client] = self._best(f"local_only:{client}", [client], 1)
        rates = sorted(set(notes.values()))
        mean = {name: sum(s.get(name, 0.0) for s in clients.values()) / len(clients) for name in _common(clients)}
        return Evaluated("local_only", self.experiment.rounds, mean, clients, f"lr {', '.join(map(str, rates))}")

    def centralised(self) -> Evaluated:
        """One model on the pooled data."""
        self.emit(Progress("centralised", 0, 1))
        scores, lr = self._best("centralised", self.population.clients, self._cohort())
        return Evaluated("centralised", self.experiment.rounds, scores, {}, f"lr {lr}")

    def _best(self, what: str, clients: Sequence[str], cohort: int) -> tuple[Scores, float]:
        """The scores at the best learning rate by held-out loss of the clients themselves."""
        own = [record for client in clients for record in self.population.heldout[client]]
        rates = self.experiment.evaluation.compare_lr or (self.experiment.work.lr,)
        found: list[tuple[float, Scores, float]] = []
        for lr in rates:
            work = self.experiment.work.tuned(lr=lr, times=cohort)
            scores = self._cached(f"{what}:{lr}", work, partial(self._train, work, clients, own))
            found.append((scores.pop("held-out loss"), scores, lr))
        _, scores, lr = min(found, key=lambda entry: entry[0])
        return scores, lr

    def _train(self, work: Work, clients: Sequence[str], own: Sequence[Record]) -> Scores:
        """Train on the clients' records; score on all held-out records, and on the clients' own."""
        key, rounds = self.experiment.key, self.experiment.rounds
        model = self.model.bound(key)
        examples = self._examples(clients)
        ctx = Ctx(0, key, 1, len(self.population.clients), rounds, client=clients[0] if len(clients) == 1 else "pooled")
        job = Job(ctx, model.fresh(key), examples, lambda grads, params: grads)
        carry = work.init([job.start])
        for round in range(rounds):
            carry = run_steps(work, [replace(job, ctx=replace(ctx, round=round))], model, carry)
        (outcome,) = work.finish(carry)
        if isinstance(outcome, str):
            raise RunError(f"the comparison with {', '.join(clients)} alone failed: {outcome}")
        params = add(job.start, outcome[0].parts["delta"].tree)
        scores = self._scores(model, params, self.heldout)
        if len(clients) == 1:
            scores |= {f"own/{name}": value for name, value in self._scores(model, params, own).items()}
        return {**scores, "held-out loss": self._loss(model, params, own)}

    def _examples(self, clients: Sequence[str]) -> list[Example]:
        records = [record for client in clients for record in self.population.train[client]]
        encoded = (self.model.encode(record, self.experiment.work.max_length) for record in records)
        return [example for example in encoded if example is not None]

    def _scores(self, model: LoadedModel, params: Tree, records: Sequence[Record]) -> Scores:
        return self.scorer.figures(self.scorer.sums(model, params, records))

    def _loss(self, model: LoadedModel, params: Tree, records: Sequence[Record]) -> float:
        scorer = replace(self.scorer, evaluation=replace(self.scorer.evaluation, metrics=("nll",), by=None), groups=())
        return scorer.figures(scorer.sums(model, params, records)).get("nll", 0.0)

    def _cohort(self) -> int:
        key = self.experiment.key.fold("cohort", 0)
        return max(1, len(self.experiment.federation.sample(self.population.clients, 0, key)))

    def _cached(self, what: str, work: Work, make: Callable[[], Scores]) -> Scores:
        whole = dump(replace(self.experiment, work=work))
        left_out = ("compare", "compare_lr", "every", "best")
        evaluation = {name: value for name, value in whole["evaluation"].items() if name not in left_out}
        kept = {name: whole[name] for name in ("task", "federation", "work", "rounds", "seed")}
        text = json.dumps([fedllm.__version__, what, kept, evaluation, _fingerprint(self.population)], sort_keys=True)
        path = cache_dir() / "compare" / f"{hashlib.sha256(text.encode()).hexdigest()}.json"
        if path.is_file():
            scores: Scores = json.loads(path.read_text(encoding="utf-8"))
            return scores
        scores = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        write_durably(part, json.dumps(scores).encode())
        part.replace(path)
        return scores


def _common(clients: Mapping[str, Scores]) -> list[str]:
    return list(next(iter(clients.values()), {}))


def _fingerprint(population: Population) -> str:
    """A hash of the records, so that a changed file is not mistaken for the old one."""
    state = hashlib.sha256()
    for side in (population.train, population.heldout):
        for client, records in side.items():
            state.update(json.dumps([client, list(records)], sort_keys=True, default=str).encode())
    return state.hexdigest()
