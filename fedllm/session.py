"""A session: one process's share of a run, from its first round or its newest checkpoint to its summary.

A round's events are saved with its checkpoint (`pending`) before the log hears of them, so that a process that dies
between the two leaves nothing out: the next one writes what the log lacks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

from fedllm import loop, tree
from fedllm.advice import advice
from fedllm.aggregate import Call
from fedllm.best import best_of
from fedllm.compare import Comparison
from fedllm.config import dump, experiment_hash
from fedllm.errors import FedllmError
from fedllm.evaluation.scores import Scorer
from fedllm.events import (
    CheckpointSaved,
    DataReported,
    Emit,
    Evaluated,
    Event,
    Log,
    Resumed,
    RoundFinished,
    RunFinished,
    RunStarted,
    Warned,
    from_json,
    read,
    to_json,
)
from fedllm.experiment import Experiment
from fedllm.federation import Population
from fedllm.folder import Folder, versions
from fedllm.ledger import Ledger, elapsed, limit_reached
from fedllm.observer import Observer
from fedllm.outputs import write_outputs
from fedllm.state import Checkpoints, Run
from fedllm.tasks.model import LoadedModel


@dataclass(eq=False)
class Session:
    """`state` is that of the last complete round; it changes in one step, with all that belongs to the round."""

    experiment: Experiment
    folder: Folder
    model: LoadedModel
    population: Population
    log: Log
    ledger: Ledger
    state: Run

    def __post_init__(self) -> None:
        self.checkpoints = Checkpoints(self.folder.checkpoints, self.experiment.limits.keep_last)
        self.comparison = Comparison(self.experiment, self.model, self.population, self.log)
        self.observer = Observer.of(self.experiment, self.model, self.population.clients)

    def begin(self, *, engine: str, name: str) -> None:
        """The events of the start, the base's scores, and checkpoint 0."""
        self.log(
            RunStarted(
                name=name,
                experiment_hash=experiment_hash(self.experiment),
                engine=engine,
                model=self.model.base.title,
                rounds=self.experiment.rounds,
                clients=len(self.population.clients),
                trainable=tree.num_values(self.state.params),
                settings=dump(self.experiment),
                versions={**versions(), **self.model.computed_by},
            )
        )
        self.log(self.population.report)
        warnings = _warnings(self.population.report, self.experiment.work.max_length)
        for text in [*warnings, *advice(self.experiment, self.population)]:
            self.log(Warned(text))
        self._complete(self.state, [self.comparison.base()] if self._has_heldout() else [], save=True)

    def resume(self, listeners: Sequence[Emit]) -> None:
        """Go on from the newest checkpoint. The listeners hear again what the run is."""
        saved = self.checkpoints.load()
        assert saved is not None
        self.state = saved
        logged = [event for _, event in read(self.folder.events)]
        for started in (event for event in logged if isinstance(event, RunStarted)):
            for listener in listeners:
                listener(started)
        known = {_text(to_json(event)) for event in logged}
        for record in saved.pending:
            lost = from_json(record)
            if lost is not None and _text(record) not in known:
                self.log(lost)
                logged.append(lost)
        if self.observer is not None:
            for event in (*logged, Resumed(saved.round)):
                self.observer.alarms(event)
        self.log(Resumed(saved.round))

    def rounds(self, call: Call) -> None:
        """The rounds that are left, unless a limit ends the run."""
        while self.state.round < self.experiment.rounds and not limit_reached(self.experiment, self.state):
            self._round(call)

    def comparisons(self) -> None:
        """What `evaluation.compare` asks for and the log does not hold yet. One that fails is left out."""
        done = {event.which for _, event in read(self.folder.events) if isinstance(event, Evaluated)}
        wanted = self.experiment.evaluation.compare if self._has_heldout() else ()
        for which in wanted:
            if which in done:
                continue
            made: Event
            try:
                made = self.comparison.local_only() if which == "local_only" else self.comparison.centralised()
            except FedllmError as error:
                made = Warned(f"{which} has no figures: {error}")
            self.log(made)

    def finish(self, engine: str) -> None:
        """The end of the log, the adapters and the summary."""
        seconds = elapsed(read(self.folder.events))
        self.log(RunFinished(self.state.round, round(seconds, 3), limit_reached(self.experiment, self.state)))
        write_outputs(self.experiment, self.folder, self.model, self.state, engine, seconds)

    def secure(self) -> None:
        """Save the last complete round if it is not on disk yet. The next process writes the events that are lost."""
        saved, mark = self.checkpoints.rounds(), to_json(CheckpointSaved(self.state.round))
        if saved and self.state.round not in saved:
            earlier = [record for record in self.state.pending if record != mark]
            self.checkpoints.save(replace(self.state, pending=[*earlier, mark]))

    def _round(self, call: Call) -> None:
        began, exp = perf_counter(), self.experiment
        self.ledger.take()
        cohort = self.observer.cohort() if self.observer is not None else None
        state, result = loop.one_round(self.state, exp, self.population.clients, call, self.log, cohort)
        sent, seconds = self.ledger.take(), perf_counter() - began
        sent = replace(sent, tokens=result.tokens, computed=result.computed, seconds=seconds)
        state = replace(state, totals=state.totals.plus(sent))
        last = state.round == exp.rounds or bool(limit_reached(exp, state))
        events: list[Event] = []
        every = exp.evaluation.every
        if self._has_heldout() and (last or (every is not None and state.round % every == 0)):
            scored = self._evaluate(state, call)
            state = replace(state, best=best_of(state.best, scored, exp.evaluation))
            state = replace(state, totals=state.totals.plus(self.ledger.take()))
            events.append(scored)
        finished = RoundFinished(
            round=self.state.round,
            clients=result.clients,
            loss=result.loss,
            bytes_up=sent.bytes_up,
            bytes_down=sent.bytes_down,
            tokens=result.tokens,
            seconds=round(sent.seconds, 4),
            note=result.note,
        )
        closed = [finished] if self.observer is None else self.observer.closed(cohort, result.came_to(state), finished)
        best = state.best is not None and state.best[0] == state.round
        save = last or best or state.round % exp.limits.checkpoint_every == 0
        self._complete(state, [*events, *closed], save=save)

    def _complete(self, state: Run, events: Sequence[Event], *, save: bool) -> None:
        """Make the state durable, then say so."""
        events = [*events, CheckpointSaved(state.round)] if save else events
        self.state = replace(state, pending=[to_json(event) for event in events])
        if save:
            self.checkpoints.save(self.state)
        for event in events:
            self.log(event)

    def _evaluate(self, state: Run, call: Call) -> Evaluated:
        scorer = Scorer.of(self.experiment, self.population)
        asked = scorer.add_up((), {})
        total, clients = loop.evaluate(state, self.experiment, self.population.clients, call, self.log, asked)
        scores = {client: scorer.figures(sums) for client, sums in clients.items()}
        return Evaluated("federated", state.round, scorer.figures(total), scores)

    def _has_heldout(self) -> bool:
        return bool(self.experiment.evaluation.metrics) and any(map(len, self.population.heldout.values()))


def _warnings(report: DataReported, max_length: int) -> list[str]:
    told = {
        f"the split leaves out {report.left_out} records": report.left_out,
        f"{report.cut} records are cut to {max_length} tokens, the work's max_length": report.cut,
        f"{report.dropped} records keep no labelled token in {max_length} tokens and are not used": report.dropped,
    }
    return [text for text, count in told.items() if count]


def _text(record: Mapping[str, Any]) -> str:
    return json.dumps(record, sort_keys=True)
