"""`run`: an experiment from its check to its summary."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import fedllm
from fedllm import loop, tree
from fedllm.aggregate import Call
from fedllm.check import check
from fedllm.compare import Comparison
from fedllm.config import dump, experiment_hash
from fedllm.engine import Engine
from fedllm.engines.catalog import engine_of
from fedllm.errors import RunError
from fedllm.evaluation.scores import LOWER_IS_BETTER, Scorer, check_metrics
from fedllm.events import (
    CheckpointSaved,
    Emit,
    Evaluated,
    Event,
    Log,
    Resumed,
    RoundFinished,
    RunFinished,
    RunStarted,
    Warned,
    Wire,
    from_json,
    read,
    to_json,
)
from fedllm.experiment import Experiment
from fedllm.federation import Population
from fedllm.folder import Folder, default_folder
from fedllm.outputs import write_outputs
from fedllm.state import Checkpoints, Run, Totals
from fedllm.tasks.model import LoadedModel, load
from fedllm.tree import Tree


@dataclass(frozen=True, eq=False)
class Result:
    """A finished run."""

    folder: Path
    summary: Mapping[str, Any]
    params: Tree


class Interrupted(Exception):
    """The run was stopped from outside; its folder can be resumed."""

    def __init__(self, folder: Path, round: int) -> None:
        super().__init__(f"stopped; {round} complete rounds are saved in {folder}")
        self.folder = folder


def run(
    experiment: Experiment,
    *,
    engine: str | Engine = "auto",
    out: str | Path | None = None,
    resume: bool = False,
    name: str = "experiment",
    listeners: Sequence[Emit] = (),
) -> Result:
    """Check, simulate, evaluate, compare and write the run folder.

    Args:
        engine: a name (see `fedllm run --help`) or an engine. out: the run folder; default `runs/NAME-HASH8`.
        resume: go on with an unfinished run. listeners: are called with each event.

    A finished run is returned as it is. Raises `FedllmError` for everything that a user can mend.
    """
    check(experiment)
    check_metrics(experiment.evaluation)
    folder = Folder(Path(out) if out is not None else default_folder(experiment, name))
    folder.admit(experiment, resume=resume)
    checkpoints = Checkpoints(folder.checkpoints, experiment.limits.keep_last)
    if folder.finished:
        saved = checkpoints.load()
        return Result(folder.path, folder.read_summary(), {} if saved is None else saved.params)
    chosen, engine_name = engine_of(engine, experiment)
    population = experiment.federation.load(experiment.key)
    Scorer.of(experiment, population)
    model = load(experiment.task)
    fresh = model.fresh(experiment.key)
    new = not folder.started
    if new:
        folder.create(experiment, versions(), name)
    ledger = Ledger()
    log = Log(folder.events, (ledger, *listeners))
    session = Session(experiment, folder, checkpoints, model, population, ledger, log)
    with chosen.open(experiment, folder.memories, log) as call:
        try:
            if new or checkpoints.load() is None:
                session.begin(fresh, engine_name, name)
            else:
                session.resume()
            session.rounds(call)
            session.comparisons()
        except KeyboardInterrupt:
            session.save_if_needed()
            raise Interrupted(folder.path, session.state.round) from None
        return session.finish(engine_name)


@dataclass(eq=False)
class Ledger:
    """Adds up what crossed the wire since it was last emptied."""

    up: int = 0
    down: int = 0
    evaluation: int = 0

    def __call__(self, event: Event) -> None:
        """Listen."""
        if isinstance(event, Wire):
            if event.call == "evaluate":
                self.evaluation += event.bytes
            elif event.direction == "up":
                self.up += event.bytes
            else:
                self.down += event.bytes

    def take(self) -> Totals:
        """The sums; then start anew."""
        totals = Totals(bytes_up=self.up, bytes_down=self.down, evaluation_bytes=self.evaluation)
        self.up = self.down = self.evaluation = 0
        return totals


@dataclass(eq=False)
class Session:
    """One process's share of a run."""

    experiment: Experiment
    folder: Folder
    checkpoints: Checkpoints
    model: LoadedModel
    population: Population
    ledger: Ledger
    log: Log
    started: float = field(default_factory=perf_counter)
    state: Run = field(init=False)
    note: str = ""

    @property
    def comparison(self) -> Comparison:
        """Trains and scores without a federation."""
        return Comparison(self.experiment, self.model, self.population, self.log)

    def begin(self, fresh: Tree, engine: str, name: str) -> None:
        """The events of the start, the base's scores, and checkpoint 0."""
        self.state = loop.start(self.experiment, fresh)
        self.log(
            RunStarted(
                name=name,
                experiment_hash=experiment_hash(self.experiment),
                engine=engine,
                model=self.model.base.title,
                rounds=self.experiment.rounds,
                clients=len(self.population.clients),
                trainable=tree.num_values(fresh),
                settings=dump(self.experiment),
                versions=versions(),
            )
        )
        self.log(self._data_report())
        if self.population.report.left_out:
            self.log(Warned(f"the split leaves out {self.population.report.left_out} records"))
        self._complete([self.comparison.base()] if self._has_heldout() else [])

    def resume(self) -> None:
        """The newest checkpoint; events that belong to it and are missing in the log are written now."""
        saved = self.checkpoints.load()
        assert saved is not None
        self.state = saved
        logged = [to_json(event) for _, event in read(self.folder.events)]
        for record in saved.pending:
            event = from_json(record)
            if event is not None and dict(record) not in logged:
                self.log(event)
        self.log(Resumed(saved.round))

    def rounds(self, call: Call) -> None:
        """The rounds that are left, unless a limit ends the run."""
        while self.state.round < self.experiment.rounds and not self._limited():
            self._round(call)

    def comparisons(self) -> None:
        """What `evaluation.compare` asks for."""
        if not self._has_heldout():
            return
        done = {e.which for _, e in read(self.folder.events) if isinstance(e, Evaluated)}
        for which in self.experiment.evaluation.compare:
            if which not in done:
                made = self.comparison.local_only() if which == "local_only" else self.comparison.centralised()
                self.log(made)

    def finish(self, engine: str) -> Result:
        """The adapter, the summary and the report."""
        seconds = perf_counter() - self.started
        self.log(RunFinished(self.state.round, round(seconds, 3), self.note))
        self.log.close()
        write_outputs(self.experiment, self.folder, self.model, self.state, engine, seconds)
        return Result(self.folder.path, self.folder.read_summary(), self.state.params)

    def save_if_needed(self) -> None:
        """Save complete rounds that are not on disk yet."""
        if self.state.round not in self.checkpoints.rounds():
            self.checkpoints.save(self.state)

    def _round(self, call: Call) -> None:
        began, exp = perf_counter(), self.experiment
        clients = self.population.clients
        self.ledger.take()
        state, result = loop.one_round(self.state, exp, clients, call, self.log)
        events: list[Event] = []
        due = exp.evaluation.every is not None and state.round % exp.evaluation.every == 0
        seconds = perf_counter() - began
        if self._has_heldout() and (due or state.round == exp.rounds):
            events.append(self._evaluate(state, call))
            state = replace(state, best=self._best(state, events[0]))
        sent = replace(self.ledger.take(), tokens=result.tokens, seconds=seconds)
        events.append(
            RoundFinished(
                round=self.state.round,
                clients=result.clients,
                loss=result.loss,
                bytes_up=sent.bytes_up,
                bytes_down=sent.bytes_down,
                tokens=result.tokens,
                seconds=round(seconds, 4),
                note=result.note,
            )
        )
        self.state = replace(state, totals=self.state.totals.plus(sent))
        last = self.state.round == exp.rounds or self._limited()
        self._complete(events, save=last or self.state.round % exp.limits.checkpoint_every == 0)

    def _complete(self, events: Sequence[Event], save: bool = True) -> None:
        """Make the state durable, then say so."""
        self.state = replace(self.state, pending=[to_json(event) for event in events])
        if save:
            self.checkpoints.save(self.state)
        for event in events:
            self.log(event)
        if save:
            self.log(CheckpointSaved(self.state.round))

    def _evaluate(self, state: Run, call: Call) -> Evaluated:
        scorer = Scorer.of(self.experiment, self.population)
        total, clients = loop.evaluate(state, self.experiment, self.population.clients, call, self.log)
        scores = {client: scorer.figures(sums) for client, sums in clients.items()}
        return Evaluated("federated", state.round, scorer.figures(total), scores)

    def _best(self, state: Run, event: Event) -> tuple[int, float] | None:
        metric = self.experiment.evaluation.best or self.experiment.evaluation.metrics[0]
        assert isinstance(event, Evaluated)
        value = event.metrics.get(metric)
        if value is None:
            return state.best
        sign = -1 if metric in LOWER_IS_BETTER else 1
        if state.best is None or sign * value > sign * state.best[1]:
            return (state.round, value)
        return state.best

    def _has_heldout(self) -> bool:
        return bool(self.experiment.evaluation.metrics) and any(map(len, self.population.heldout.values()))

    def _limited(self) -> bool:
        totals, limits = self.state.totals, self.experiment.limits
        sent = totals.bytes_up + totals.bytes_down
        if limits.bytes is not None and sent >= limits.bytes:
            self.note = f"limits.bytes ({limits.bytes}) was reached with {sent} bytes after {self.state.round} rounds"
        if limits.seconds is not None and totals.seconds >= limits.seconds:
            self.note = f"limits.seconds ({limits.seconds}) was reached after {self.state.round} rounds"
        return bool(self.note)

    def _data_report(self) -> Event:
        """The partition, with what the template cut or dropped."""
        length, cut, dropped = self.experiment.work.max_length, 0, 0
        for client, records in self.population.train.items():
            examples = [self.model.encode(record, length) for record in records]
            cut += sum(1 for example in examples if example is not None and example.cut)
            dropped += sum(1 for example in examples if example is None)
            if not any(example is not None for example in examples):
                raise RunError(
                    f"no record of {client} keeps a labelled token in {length} tokens; raise work.max_length"
                )
        return replace(self.population.report, cut=cut, dropped=dropped)


def versions() -> dict[str, str]:
    """What the figures were made with."""
    libraries = {name: version(name) for name in ("torch", "transformers", "safetensors")}
    return {"fedllm": fedllm.__version__, "python": platform.python_version(), **libraries}
