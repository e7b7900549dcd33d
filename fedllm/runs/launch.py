"""`run`: an experiment from its check to its summary."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import time
from typing import Any

from fedllm.data.federation import Population
from fedllm.engines.base import Engine
from fedllm.engines.registry import choose, engine_name, engine_of
from fedllm.errors import FedllmError, RunError, counted
from fedllm.evaluation.scores import Scorer, check_metrics
from fedllm.events import DataReported, Emit, EngineChosen, Warned
from fedllm.experiment.checks.check import check, check_profiles
from fedllm.experiment.checks.privacy import check_privacy, check_secret_draws
from fedllm.experiment.checks.secrecy import check_weights
from fedllm.experiment.privacy import PrivacyPlan
from fedllm.experiment.record import Experiment
from fedllm.models.loaded_model import LoadedModel, load
from fedllm.runs import server_round
from fedllm.runs.checkpoints import Checkpoints
from fedllm.runs.continuation import Origin, origin_of, refuse_another_model
from fedllm.runs.dry_run import dry_run, require_positions
from fedllm.runs.event_log import Log
from fedllm.runs.fingerprint import Inputs, changed, changed_since, inputs_of
from fedllm.runs.folder import ELSEWHERE, Folder, Status, default_folder, versions
from fedllm.runs.lock import locked
from fedllm.runs.privacy_ledger import PrivacyLedger
from fedllm.runs.resource_usage import TrafficMeter
from fedllm.runs.session import RunSession, failed
from fedllm.tensors.base_delta import BaseDelta
from fedllm.tensors.tree import Tree


@dataclass(frozen=True, eq=False)
class Result:
    """A finished run. `params`: the shared tensors of its last round. `base_delta`: what was added to the frozen
    weights."""

    folder: Path
    summary: Mapping[str, Any]
    params: Tree
    base_delta: BaseDelta = BaseDelta()


class Interrupted(Exception):
    """The run was stopped from outside; its folder can be resumed."""

    def __init__(self, folder: Path, rounds: int) -> None:
        super().__init__(
            f"stopped; {counted(rounds, 'complete round')} {'is' if rounds == 1 else 'are'} saved in {folder}"
        )
        self.folder, self.rounds = folder, rounds


def run(
    experiment: Experiment,
    *,
    engine: str | Engine = "auto",
    out: str | Path | None = None,
    resume: bool = False,
    continues: str | Path | None = None,
    name: str = "experiment",
    listeners: Sequence[Emit] = (),
    began: float | None = None,
) -> Result:
    """Check, simulate, evaluate, compare and write the run folder. A finished run is returned as it is.

    Args:
        engine: a name (see `fedllm run --help`) or an engine. out: the run folder; default `runs/NAME-HASH8`.
        resume: go on with an unfinished run, if there is one. continues: the folder of a finished run, to go on from
            with more rounds. listeners: are called with each event. began: when the command did, in seconds since the
            epoch, for the run's `seconds`; default: now.

    Raises:
        FedllmError: everything that a user can mend; found before the first checkpoint, it leaves no folder behind.
        Interrupted: Ctrl-C; what is complete is saved.
    """
    start = time() if began is None else began
    check(experiment)
    check_metrics(experiment.evaluation)
    asked, given = engine_of(engine), None if continues is None else Path(continues)
    origin = None if given is None else origin_of(given, experiment)
    folder = Folder(Path(out) if out is not None else default_folder(experiment, name, given))
    plan = Plan(experiment, folder, origin, name, resume, listeners, start)
    if plan.status() == "finished":
        return _finished(plan)
    private, model, population = _loaded(experiment)
    plan = replace(plan, private=private)
    runner, why = choose(asked, experiment, model)
    check_secret_draws(private, simulated=runner.simulates)
    with locked(folder.path):
        if plan.status() == "finished":  # by another process, since it was asked
            return _finished(plan)
        with _nothing_half_written(folder, experiment):
            return _run(plan, model, population, runner, why)


@dataclass(frozen=True, eq=False)
class Plan:
    """What is to be run, where, and how it begins. `private`: what it promises, with its noise calibrated."""

    experiment: Experiment
    folder: Folder
    origin: Origin | None
    name: str
    resume: bool
    listeners: Sequence[Emit]
    began: float
    private: PrivacyPlan | None = None

    def status(self) -> Status:
        """How far the run has come.

        Raises:
            RunError: it is unfinished and not to be resumed, or something else stands there.
        """
        status, path = self.folder.status(self.experiment), self.folder.path
        if status == "new":
            return status
        mark = self.folder.about.get("continues")
        if self.origin is not None and not self.origin.same(mark):
            raise RunError(f"{path} holds a run that does not go on from {self.origin.folder.path}; {ELSEWHERE}")
        if status == "unfinished" and not self.resume:
            raise RunError(f"{path} holds this experiment, unfinished; go on with --resume")
        if status == "unfinished" and self.origin is None and mark and not self.checkpoints.rounds():
            raise RunError(f"{path} has not taken over {mark['folder']} yet; name that once more with --continue")
        return status

    @property
    def checkpoints(self) -> Checkpoints:
        """Of the folder."""
        return Checkpoints(self.folder.checkpoints, self.experiment.limits.keep_last)


def _run(plan: Plan, model: LoadedModel, population: Population, runner: Engine, why: str) -> Result:
    """From the first round, or the newest checkpoint, to the summary."""
    experiment, folder, name = plan.experiment, plan.folder, plan.name
    new, now = not plan.checkpoints.rounds(), inputs_of(experiment, model)
    if new:
        if plan.origin is not None:
            refuse_another_model(plan.origin, now)
        more = {} if plan.origin is None else {"continues": plan.origin.mark}
        folder.create(experiment, name, inputs=now, **more)
    else:
        _refuse_changes(plan, now)
    kind = engine_name(runner)
    opened = _session(plan, model, population, _computed_by(runner, model))
    with opened as session, runner.open(session.experiment, folder.memories, session.log) as call:
        if not new:
            session.resume(plan.listeners)
        elif plan.origin is not None:
            session.take_over(plan.origin, plan.listeners, now, engine=kind, name=name)
        else:
            session.begin(engine=kind, name=name)
        session.log(EngineChosen(kind, why))
        session.rounds(call)
        if failure := session.failure():
            session.fail(kind, failure)
        session.adapters()
        session.score_personal()
        session.train_baselines()
        session.finish(kind)
    return Result(folder.path, folder.read_summary(), session.state.params, session.state.base_delta)


def _refuse_changes(plan: Plan, now: Inputs) -> None:
    """
    Raises:
        RunError: what the run is made from is not what it was when it began.
    """
    found = changed(plan.experiment, plan.folder.about.get("inputs", now), now)
    if found:
        raise RunError(
            f"since the run in {plan.folder.path} began, {', '.join(found)} changed, so its rounds would mix old and "
            f"new; put back what it began with, or begin a new run: {ELSEWHERE}"
        )


def _finished(plan: Plan) -> Result:
    """What an earlier process has left. Listeners are warned where it is of data or a model that has changed since.

    Raises:
        RunError: it has left no result.
    """
    folder, figures = plan.folder, plan.folder.read_summary()
    if figures.get("failure"):
        raise failed(folder, figures["failure"])
    found = changed_since(plan.experiment, folder.about.get("inputs", {}))
    if found:
        text = f"since this run ended, {', '.join(found)} changed; its figures are of what was there before"
        for listener in plan.listeners:
            listener(Warned(f"{text} (to run it anew, {ELSEWHERE})"))
    saved = plan.checkpoints.load()
    if saved is None:
        return Result(folder.path, figures, {})
    return Result(folder.path, figures, saved.params, saved.base_delta)


def _loaded(experiment: Experiment) -> tuple[PrivacyPlan | None, LoadedModel, Population]:
    """The privacy plan, model and data, after all that can be refused about the data without a model.

    Raises:
        FedllmError: they cannot be had, or do not fit each other.
    """
    population = experiment.federation.load(experiment.key)
    profiles = {client: experiment.federation.profile(client) for client in population.clients}
    check_profiles(experiment, profiles)
    sizes = {client: len(own) for client, own in population.train.items()}
    check_weights(experiment, sizes)
    private = check_privacy(experiment, sizes)
    Scorer.of(experiment.evaluation, experiment.work.max_length, population)
    model = load(experiment.task)
    dry_run(experiment, model, profiles)
    require_positions(experiment, model, population)
    report, sizes = _data_report(experiment, model, population)
    if report.dropped:  # clients draw from what is left, at a higher rate
        private = check_privacy(experiment, sizes)
    return private, model, replace(population, report=report)


@contextmanager
def _nothing_half_written(folder: Folder, experiment: Experiment) -> Iterator[None]:
    """A run that is refused before its first checkpoint leaves no folder behind."""
    try:
        yield
    except FedllmError:
        if not Checkpoints(folder.checkpoints, experiment.limits.keep_last).rounds():
            folder.discard()
        raise


def _computed_by(runner: Engine, model: LoadedModel) -> str:
    """What a client's bits depend on beside the experiment. A GPU does not repeat its bits, so there no two processes
    are the same."""
    told = {"engine": repr(runner), "cores": str(os.cpu_count()), **versions(), **model.backend}
    own = "" if model.device == "cpu" else os.urandom(16).hex()
    return repr((sorted(told.items()), own))


@contextmanager
def _session(plan: Plan, model: LoadedModel, population: Population, computed_by: str) -> Iterator[RunSession]:
    """A session that writes the log. Ctrl-C leaves every complete round on the disk."""
    private, folder = plan.private, plan.folder
    traffic, experiment = TrafficMeter(), plan.experiment if private is None else private.experiment
    ledger = None if private is None else PrivacyLedger(private, folder.path, computed_by)
    start = server_round.initial_state(experiment, model.initial_params(experiment.key))
    with closing(Log(plan.folder.events, (traffic, *plan.listeners))) as log:
        session = RunSession(experiment, folder, model, population, log, traffic, start, plan.began, ledger)
        try:
            yield session
        except KeyboardInterrupt:
            session.secure()
            raise Interrupted(session.folder.path, session.state.round) from None


def _data_report(
    experiment: Experiment, model: LoadedModel, population: Population
) -> tuple[DataReported, dict[str, int]]:
    """The partition, with what the template cut or dropped; the examples that each client is left with.

    Raises:
        RunError: a client is left without anything to train on.
    """
    length, cut, sizes = experiment.work.max_length, 0, dict[str, int]()
    for client, records in population.train.items():
        kept = 0
        for example in model.encode_all(records, length):
            kept += example is not None
            cut += example is not None and example.cut > 0
        if not kept:
            raise RunError(
                f"no record of {client} keeps a target token in {length} tokens; raise the work's max_length"
            )
        sizes[client] = kept
    held = Scorer.of(experiment.evaluation, length, population).unfit(model, population)
    report = replace(
        population.report,
        cut=cut,
        dropped=sum(map(len, population.train.values())) - sum(sizes.values()),
        heldout_cut=held.cut,
        heldout_dropped=held.dropped,
        heldout_choices=held.choices,
    )
    return report, sizes
