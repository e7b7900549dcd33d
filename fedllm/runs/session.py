"""A session: one process's share of a run, from its first round or its newest checkpoint to its summary.

A round's events are saved with its checkpoint (`pending`) before they are written to the log. So a process that
dies between the two loses none of them: the next one writes what the log lacks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter, time
from typing import Any

from fedllm.data.federation import Population
from fedllm.engines.client_store import ClientStore
from fedllm.errors import CheckError, RunError, reason
from fedllm.evaluation.model_selection import best_of
from fedllm.evaluation.record_length import Unfit
from fedllm.evaluation.scores import Scorer
from fedllm.events import (
    CheckpointSaved,
    ClientFailed,
    DataReported,
    Emit,
    Evaluated,
    Event,
    PersonalEvaluated,
    Resumed,
    RoundFinished,
    RunFinished,
    RunStarted,
    Warned,
    from_json,
    read,
    to_json,
)
from fedllm.experiment.checks.advice import advice
from fedllm.experiment.config_file import dump
from fedllm.experiment.record import Experiment
from fedllm.messages.call import Call
from fedllm.models.loaded_model import LoadedModel
from fedllm.runs import server_round
from fedllm.runs.artifacts import summary, write_adapters, write_summary
from fedllm.runs.baselines import Baselines
from fedllm.runs.checkpoints import Checkpoints
from fedllm.runs.continuation import Origin, hand_over, warnings
from fedllm.runs.event_log import Log
from fedllm.runs.fingerprint import Inputs
from fedllm.runs.folder import Folder, versions
from fedllm.runs.monitor import RoundMonitor
from fedllm.runs.personal_evaluation import scored
from fedllm.runs.privacy_ledger import BudgetSpentError, PrivacyLedger
from fedllm.runs.privacy_words import promised
from fedllm.runs.resource_usage import TrafficMeter, elapsed, limit_reached
from fedllm.runs.state import ServerState
from fedllm.tensors import tree


@dataclass(eq=False)
class RunSession:
    """`state` is that of the last complete round; it changes in one step, with all that belongs to the round. `began`:
    when the command did, in seconds since the epoch. `ledger`: of a private experiment, what was released."""

    experiment: Experiment
    folder: Folder
    model: LoadedModel
    population: Population
    log: Log
    traffic: TrafficMeter
    state: ServerState
    began: float
    ledger: PrivacyLedger | None = None
    spent: str = ""  # why the budget ends the run

    def __post_init__(self) -> None:
        self.checkpoints = Checkpoints(self.folder.checkpoints, self.experiment.limits.keep_last)
        self.store = ClientStore(self.folder.memories)
        self.baselines = Baselines(self.experiment, self.model, self.population, self.log)
        self.observer = RoundMonitor.of(self.experiment, self.model, self.population.clients)

    def begin(self, *, engine: str, name: str) -> None:
        """The events of the start, the base's scores, and checkpoint 0."""
        for event in self._opening(engine, name):
            self.log(event)
        self._complete(self.state, [self.baselines.base()] if self._has_heldout() else [], save=True)

    def take_over(self, origin: Origin, listeners: Sequence[Emit], now: Inputs, *, engine: str, name: str) -> None:
        """Go on from what another run has come to: its log and its last checkpoint, with a start and base scores of
        this run."""
        if self.ledger is not None:
            self.ledger.restore(origin.state.spent)
            if passes := self.ledger.passes_budget(origin.state.round):
                raise CheckError(f"{passes}; raise it, or do not go on from {origin.folder.path}")
        hand_over(origin, self.folder, self.experiment, self._opening(engine, name, origin.state.round))
        self.resume(listeners)
        if self._has_heldout():
            self.log(self.baselines.base())
        for text in warnings(origin, self.experiment, now):
            self.log(Warned(text))

    def _opening(self, engine: str, name: str, done: int = 0) -> list[Event]:
        """The events of the start; `done`: rounds of the run that this one goes on from."""
        report = self.population.report
        return [
            RunStarted(
                name=name,
                experiment_hash=self.folder.about["experiment_hash"],
                engine=engine,
                model=self.model.base.title,
                rounds=self.experiment.rounds,
                clients=len(self.population.clients),
                trainable=tree.num_values(self.state.params),
                settings=dump(self.experiment),
                versions={**versions(), **self.model.backend},
                seconds=self._before(),
            ),
            *([] if self.ledger is None else [promised(self.ledger, done)]),
            report,
            *(Warned(text) for text in _warnings(report, self.experiment.work.max_length)),
            *(Warned(text) for text in advice(self.experiment, self.population)),
        ]

    def resume(self, listeners: Sequence[Emit]) -> None:
        """Go on from the newest checkpoint. The listeners hear again what the run is.

        Raises:
            RunError: the checkpoint is damaged, or a client's memory is gone.
        """
        saved = self.checkpoints.load()
        assert saved is not None
        self.store.require(saved.remembered)
        self.state = saved
        if self.ledger is not None:
            self.ledger.restore(saved.spent)
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
        self.log(Resumed(saved.round, self._before()))
        if self.ledger is not None and len(self.ledger.saved()) > len(saved.spent):  # by rounds that were lost
            self.ledger.write()
            self.log(self.ledger.told(max(0, saved.round - 1)))

    def rounds(self, call: Call) -> None:
        """The rounds that are left, unless a limit ends the run."""
        while self.state.round < self.experiment.rounds and not self._limit(self.state):
            try:
                self._round(call)
            except BudgetSpentError as spent:
                self.spent = str(spent)

    def _limit(self, state: ServerState) -> str:
        return self.spent or limit_reached(self.experiment, state, self.ledger)

    def failure(self) -> str:
        """Why the run has no result: no round had an answer. Empty if one had."""
        if not self.state.round:
            return ""
        lost, note = None, ""
        for _, event in read(self.folder.events):
            if isinstance(event, ClientFailed) and event.call != "evaluate":
                lost = lost or event
            elif isinstance(event, RoundFinished):
                if event.clients and not event.note:
                    return ""
                note = note or f"; round {event.round + 1}: {event.note}"
        why = "" if lost is None else f"; {lost.client} was lost: {lost.reason}"
        quorum = self.experiment.limits.quorum
        enough = "an answer" if quorum == 1 else f"the {quorum} answers that limits.quorum asks for"
        return f"no round of {self.state.round} had {enough}, so nothing was trained{note}{why}"

    def fail(self, engine: str, failure: str) -> None:
        """The end of the log and the summary of a run without a result, which has no adapter.

        Raises:
            RunError: always.
        """
        self._end(engine, note=failure, failure=failure)
        raise failed(self.folder, failure)

    def adapters(self) -> None:
        """What the rounds came to, on the disk before anything that could still go wrong."""
        write_adapters(self.experiment, self.folder, self.model, self.state)

    def train_baselines(self) -> None:
        """What `evaluation.compare` asks for and the log does not hold yet. One that fails is left out, whatever the
        reason: a baseline never costs a run its results."""
        done = {event.which for _, event in read(self.folder.events) if isinstance(event, Evaluated)}
        wanted = self.experiment.evaluation.compare if self._has_heldout() else ()
        for which in wanted:
            if which in done:
                continue
            made: Event
            try:
                made = getattr(self.baselines, which)()
            except Exception as error:
                made = Warned(f"{which} has no figures: {reason(error)}")
            self.log(made)

    def score_personal(self) -> None:
        """What `evaluation.personal` asks for and the log does not hold yet; it never costs a run its results."""
        wanted = self.experiment.evaluation.personal is not None and self._has_heldout()
        done = any(
            isinstance(event, PersonalEvaluated) and event.round == self.state.round
            for _, event in read(self.folder.events)
        )
        if not wanted or done:
            return
        made: Event
        try:
            made = scored(self.experiment, self.folder, self.model, self.population, self.state, self.log)
        except Exception as error:
            made = Warned(f"the clients' own models have no figures: {reason(error)}")
        self.log(made)

    def finish(self, engine: str) -> None:
        """The end of the log and the summary."""
        self._end(engine, note=self._limit(self.state))

    def _end(self, engine: str, *, note: str, failure: str = "") -> None:
        seconds, title = elapsed(read(self.folder.events)), self.model.base.title
        self.log(RunFinished(self.state.round, round(seconds, 3), note))
        told = partial(summary, self.experiment, self.folder, self.state)
        write_summary(self.folder, told(engine=engine, seconds=seconds, title=title, failure=failure))
        if self.ledger is not None:
            self.ledger.forget(self.folder.memories)

    def _before(self) -> float:
        """Seconds since the command began."""
        return round(max(0.0, time() - self.began), 3)

    def secure(self) -> None:
        """Save the last complete round if it is not on disk yet. The next process writes the events that are lost."""
        saved, mark = self.checkpoints.rounds(), to_json(CheckpointSaved(self.state.round))
        if saved and self.state.round not in saved:
            earlier = [record for record in self.state.pending if record != mark]
            self.checkpoints.save(replace(self.state, pending=[*earlier, mark]))

    def _round(self, call: Call) -> None:
        began, exp = perf_counter(), self.experiment
        self.traffic.reset()
        observer = self.observer
        cohort = observer.cohort() if observer is not None else None
        observe = partial(observer.seen, cohort) if observer is not None and cohort is not None else None
        noise = None if self.ledger is None else self.ledger.at(self.state.round)
        state, result = server_round.run_round(self.state, exp, self.population.clients, call, self.log, observe, noise)
        state = replace(state, remembered={**state.remembered, **self.store.newest(result.cohort, state.round)})
        sent, seconds = self.traffic.reset(), perf_counter() - began
        sent = replace(sent, tokens=result.tokens, computed=result.computed, seconds=seconds)
        state = replace(state, totals=state.totals.plus(sent))
        last = state.round == exp.rounds or bool(self._limit(state))
        events: list[Event] = []
        every = exp.evaluation.every
        if self._has_heldout() and (last or (every is not None and state.round % every == 0)):
            scored = self._evaluated(state, call)
            if isinstance(scored, Evaluated):
                state = replace(state, best=best_of(state.best, scored, exp.evaluation))
            state = replace(state, totals=state.totals.plus(self.traffic.reset()))
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
        if self.ledger is not None:
            events.append(self.ledger.told(self.state.round))
        closed = [finished] if observer is None else observer.end_round(cohort, result.came_to(state), finished)
        best = state.best is not None and state.best[0] == state.round
        save = last or best or state.round % exp.limits.checkpoint_every == 0
        self._complete(state, [*events, *closed], save=save)

    def _complete(self, state: ServerState, events: Sequence[Event], *, save: bool) -> None:
        """Make the state durable, then say so."""
        events = [*events, CheckpointSaved(state.round)] if save else events
        spent = [] if self.ledger is None else self.ledger.saved()
        self.state = replace(state, pending=[to_json(event) for event in events], spent=spent)
        if save:
            self.checkpoints.save(self.state)
        if self.ledger is not None:
            self.ledger.write()
        for event in events:
            self.log(event)

    def _evaluated(self, state: ServerState, call: Call) -> Event:
        """The scores after a round, or why there are none: they never cost a run its rounds.

        Raises:
            RunError: the disk, the data or the memory of this machine, which a user mends and then resumes.
        """
        try:
            return self._evaluate(state, call)
        except RunError:
            raise
        except Exception as error:
            return Warned(f"the evaluation after round {state.round} has no figures: {reason(error)}", state.round - 1)

    def _evaluate(self, state: ServerState, call: Call) -> Evaluated:
        scorer = Scorer.of(self.experiment.evaluation, self.experiment.work.max_length, self.population)
        asked = scorer.add_up((), {})
        total, clients = server_round.evaluate(state, self.experiment, self.population.clients, call, self.log, asked)
        scores = {client: scorer.figures(sums) for client, sums in clients.items()}
        return Evaluated("federated", state.round, scorer.figures(total), scores)

    def _has_heldout(self) -> bool:
        silent = self.experiment.private and self.experiment.evaluation.private
        return (
            bool(self.experiment.evaluation.metrics) and not silent and any(map(len, self.population.heldout.values()))
        )


def failed(folder: Folder, failure: str) -> RunError:
    """The error of a run without a result."""
    return RunError(f"{failure}; mend that, then start again in another folder with --out ({folder.path} has the log)")


def _warnings(report: DataReported, max_length: int) -> list[str]:
    told = {
        f"the partition leaves out {report.left_out} records": report.left_out,
        f"{report.cut} records are cut to {max_length} tokens, the work's max_length": report.cut,
        f"{report.dropped} records keep no target token in {max_length} tokens and are not used": report.dropped,
    }
    held = Unfit(report.heldout_cut, report.heldout_dropped, report.heldout_choices)
    return [*(text for text, count in told.items() if count), *held.warnings(max_length)]


def _text(record: Mapping[str, Any]) -> str:
    return json.dumps(record, sort_keys=True)
