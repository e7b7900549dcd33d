"""Baselines, which a run is compared with: the base model, each client alone, and the pooled data.

    local_only    each client by itself: rounds x steps of its own batches, optimiser kept
    fedavg        the plain federated model: the same rounds and cohorts with every tensor shared, averaged by examples
    centralised   the pooled data: rounds x steps of batch size x cohort, optimiser kept

Each at the run's own learning rate, or at the best of `compare_lr` by loss on held-out records. A figure is cached by
the hash of what it depends on.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from threading import get_ident
from typing import Any

import torch

from fedllm.aggregators.sum import Sum
from fedllm.data.federation import ConcatRecords, Population
from fedllm.engines.client import Site, noise_key
from fedllm.engines.client_noise import RoundStreams
from fedllm.engines.client_store import ClientStore
from fedllm.engines.loopback import one_by_one
from fedllm.errors import RunError
from fedllm.evaluation.scores import Scorer
from fedllm.events import Emit, Evaluated, Event, Progress
from fedllm.experiment.config_file import dump
from fedllm.experiment.record import Demands, Experiment
from fedllm.files import cache_dir, to_json_text, write_durably
from fedllm.messages.context import RoundContext
from fedllm.models.batch import Example
from fedllm.models.loaded_model import LoadedModel
from fedllm.models.task import Scope
from fedllm.privacy.noise import new_key
from fedllm.runs.server_round import initial_state, run_round
from fedllm.stages.weighting.by_examples import ByExamples
from fedllm.tensors.tree import Tree, add
from fedllm.training.base import ClientJob, Work, run_steps
from fedllm.version import __version__

Scores = dict[str, float]
POOLED = "pooled"
CHOICE = "held-out loss"  # kept beside the scores in the cache


@dataclass(frozen=True, eq=False)
class Baselines:
    """Trains and scores without a federation, in this process."""

    experiment: Experiment
    model: LoadedModel
    population: Population
    emit: Emit

    def base(self) -> Evaluated:
        """The base model without an adapter."""
        return Evaluated("base", 0, *self._scored(self.model, {}))

    def local_only(self) -> Evaluated:
        """Each client alone, on all held-out records (the mean over clients), and on its own (`own/...`).

        A client that has no figure, such as one without held-out records of its own, is left out of that figure's
        mean; the note says of how many clients it is.
        """
        everyone = self.population.clients
        made = self._made({client: [client] for client in everyone}, "local_only", times=1)
        clients = {client: scores for client, (scores, _) in made.items()}
        values: dict[str, list[float]] = {}
        for scores in clients.values():
            for name, value in scores.items():
                values.setdefault(name, []).append(value)
        mean = {name: sum(found) / len(found) for name, found in values.items()}
        rates = ", ".join(f"{lr:g}" for lr in sorted({lr for _, lr in made.values()}))
        note = "; ".join([f"lr {rates}", *_counted(values, len(everyone))])
        return Evaluated("local_only", self.experiment.rounds, mean, clients, note)

    def centralised(self) -> Evaluated:
        """One model on the pooled data."""
        made = self._made({POOLED: self.population.clients}, "centralised", times=self._cohort())
        scores, lr = made[POOLED]
        return Evaluated("centralised", self.experiment.rounds, scores, {}, f"lr {lr:g}")

    def fedavg(self) -> Evaluated:
        """The plain federated model, on all held-out records and by client."""
        plain = plainly_shared(self.experiment)
        whole = dump(plain)
        settings = {name: whole[name] for name in ("task", "federation", "work", "stages", "limits", "rounds", "seed")}
        made = self._kept("fedavg", settings, lambda: self._federate(plain))
        clients = {client: dict(scores) for client, scores in made["clients"].items()}
        return Evaluated("fedavg", self.experiment.rounds, dict(made["all"]), clients, f"lr {plain.work.lr:g}")

    def _federate(self, plain: Experiment) -> dict[str, Any]:
        """All its rounds, and the scores of what they come to.

        Raises:
            RunError: no client answered in any round.
        """
        state, answered = initial_state(plain, self.plain.initial_params(plain.key)), 0
        site = Site(plain, self.plain, self.population, ClientStore(None), noise_key=noise_key(plain, None))
        call = one_by_one(site, _unheard)
        self.emit(Progress("fedavg", 0, plain.rounds))
        for done in range(plain.rounds):
            state, result = run_round(state, plain, self.population.clients, call, _unheard)
            answered += result.clients
            self.emit(Progress("fedavg", done + 1, plain.rounds))
        if not answered:
            raise RunError("no client answered in any round of the plain federated model")
        everyone, by_client = self._scored(self.plain.with_constants(plain.key), state.params)
        return {"all": everyone, "clients": by_client}

    def _made(self, groups: Mapping[str, Sequence[str]], what: str, *, times: int) -> dict[str, tuple[Scores, float]]:
        """For each group of clients the scores at the best learning rate, and that rate. A group that could be trained
        at none of the rates is left out.

        Independent trainings run side by side, one core each, where threads may share the model.

        Raises:
            RunError: no group could be trained.
        """
        rates = self.experiment.evaluation.compare_lr or (self.experiment.work.lr,)
        workers = (os.cpu_count() or 1) if self.model.why_not_stackable is None else 1
        found: dict[str, list[tuple[float, Scores, float]]] = {name: [] for name in groups}
        failure: RunError | None = None
        assert self.start  # before the threads begin
        with ThreadPoolExecutor(workers, initializer=partial(torch.set_num_threads, 1)) as pool:
            jobs = {
                pool.submit(
                    self._cached, f"{what}:{name}", self.experiment.work.with_lr(lr=lr, times=times), clients
                ): (
                    name,
                    lr,
                )
                for name, clients in groups.items()
                for lr in rates
            }
            self.emit(Progress(what, 0, len(jobs)))
            for done, job in enumerate(as_completed(jobs), start=1):
                name, lr = jobs[job]
                try:
                    scores = job.result()
                    loss = scores.pop(CHOICE)
                    found[name].append((math.inf if math.isnan(loss) else loss, scores, lr))
                except RunError as error:
                    failure = error
                self.emit(Progress(what, done, len(jobs)))
        trained = {name: entries for name, entries in found.items() if entries}
        if failure is not None and not trained:
            raise failure
        best = {name: min(entries, key=lambda entry: (entry[0], entry[2])) for name, entries in trained.items()}
        return {name: (scores, lr) for name, (_, scores, lr) in best.items()}

    @cached_property
    def plain(self) -> LoadedModel:
        """The model with the plain adapter of its kind."""
        return self.model.baseline

    @cached_property
    def start(self) -> str:
        """A checksum of what is trained from: the base model's weights and the adapter's initial values. Names alone
        would take a model whose files have changed for the old one."""
        return f"{self.model.base.digest} {self.plain.start_digest(self.experiment.key)}"

    def _train(self, work: Work, clients: Sequence[str]) -> Scores:
        """Train on the clients' records; score on all held-out records, and on the clients' own."""
        key, rounds = self.experiment.key, self.experiment.rounds
        model = self.plain.with_constants(key)
        name = clients[0] if len(clients) == 1 else POOLED
        ctx = RoundContext(0, key, 1, len(self.population.clients), rounds, client=name)
        start = {name: leaf.to(model.device) for name, leaf in model.initial_params(key).items()}
        job, secret = ClientJob(ctx, start, self._examples(clients)), new_key()
        carry = work.init([job])
        for round in range(rounds):
            now = replace(ctx, round=round)
            carry = run_steps(work, [replace(job, ctx=now, noise=RoundStreams(secret, now))], model, carry)
        (outcome,) = work.finish(carry)
        if isinstance(outcome, str):
            raise RunError(f"the baseline of {name} alone failed: {outcome}")
        params = add(job.initial, outcome[0].parts["delta"].tree)
        scores, by_client = self._scored(model, params)
        own = {f"own/{metric}": value for metric, value in by_client[name].items()} if name in by_client else {}
        return {**scores, **own, CHOICE: self._loss(model, params, clients)}

    def _examples(self, clients: Sequence[str]) -> list[Example]:
        records = [record for client in clients for record in self.population.train[client]]
        encoded = self.model.encode_all(records, self.experiment.work.max_length)
        return [example for example in encoded if example is not None]

    def _scored(self, model: LoadedModel, params: Tree) -> tuple[Scores, dict[str, Scores]]:
        """One set of parameters on all held-out records: in all, and by client."""
        scorer = Scorer.of(self.experiment.evaluation, self.experiment.work.max_length, self.population)
        owned = {client: scorer.chosen(rows) for client, rows in self.population.heldout.items()}
        records = ConcatRecords(owned.values())
        pairs = scorer.pairs(model, params, records)
        by_client: dict[str, Scores] = {}
        start = 0
        for client, rows in owned.items():
            mine = slice(start, start + len(rows))
            measured = {metric: found[mine] for metric, found in pairs.items()}
            by_client[client] = scorer.figures(scorer.add_up(rows, measured))
            start = mine.stop
        return scorer.figures(scorer.add_up(records, pairs)), by_client

    def _loss(self, model: LoadedModel, params: Tree, clients: Sequence[str]) -> float:
        """The loss on the clients' own held-out records, which chooses among `compare_lr`."""
        if len(self.experiment.evaluation.compare_lr) < 2:
            return 0.0
        evaluation = replace(self.experiment.evaluation, metrics=("nll",), by=None, best=None)
        scorer = Scorer(evaluation, self.experiment.work.max_length)
        own = [record for client in clients for record in scorer.chosen(self.population.heldout[client])]
        return scorer.figures(scorer.sums(model, params, own)).get("nll", math.inf)

    def _cohort(self) -> int:
        return max(1, len(self.experiment.federation.sample(self.population.clients, 0, self.experiment.key)))

    def _cached(self, what: str, work: Work, clients: Sequence[str]) -> Scores:
        whole = dump(replace(self.experiment, work=work))
        kept = {name: whole[name] for name in ("task", "federation", "work", "rounds", "seed")}
        scores = self._kept(what, kept, lambda: self._train(work, clients))
        return {name: math.nan if value is None else value for name, value in scores.items()}

    def _kept(self, what: str, settings: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What the cache holds for these settings, or what is made now and kept there."""
        left_out = ("compare", "compare_lr", "every", "best", "personal")
        whole = dump(self.experiment)["evaluation"]
        evaluation = {name: value for name, value in whole.items() if name not in left_out}
        made = {"fedllm": __version__, **self.model.backend}
        text = json.dumps([made, what, settings, evaluation, _fingerprint(self.population), self.start], sort_keys=True)
        path = cache_dir() / "compare" / f"{hashlib.sha256(text.encode()).hexdigest()}.json"
        with suppress(OSError, ValueError):  # not there, or damaged
            known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return known
        scores = make()
        with suppress(OSError):  # a cache that cannot be written to costs time and no figure
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}-{get_ident()}.part")
            write_durably(part, to_json_text(scores).encode())
            part.replace(path)
        return scores


def plainly_shared(experiment: Experiment) -> Experiment:
    """The same experiment with every tensor that trains shared, averaged by examples, and nothing else on its way: of
    an adapter with lora_A and lora_B that is FedIT."""
    scope = replace(experiment.task.scope, share=("*",), hold=(), phases=())
    scope = scope if experiment.task.adapter.baseline is experiment.task.adapter else Scope()
    return replace(
        experiment,
        task=replace(experiment.task, scope=scope, adapter=experiment.task.adapter.baseline),
        stages=(ByExamples(),),
        aggregator=Sum(),
        demands=Demands(),
        evaluation=replace(experiment.evaluation, personal=None),
    )


def _unheard(event: Event) -> None:
    """The rounds of a baseline are none of the run's."""


def _counted(values: Mapping[str, Sequence[float]], clients: int) -> list[str]:
    """Of how many clients a mean is, where it is not of all."""
    fewer: dict[int, list[str]] = {}
    for name, found in values.items():
        if len(found) < clients:
            fewer.setdefault(len(found), []).append(name)
    return [f"of {count} of {clients} clients: {', '.join(names)}" for count, names in fewer.items()]


def _fingerprint(population: Population) -> str:
    """A hash of the records, so that a changed file is not mistaken for the old one."""
    state = hashlib.sha256()
    for side in (population.train, population.heldout):
        for client, records in side.items():
            state.update(json.dumps([client, list(records)], sort_keys=True, default=str).encode())
    return state.hexdigest()
