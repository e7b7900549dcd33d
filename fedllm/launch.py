"""`run`: an experiment from its check to its summary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedllm import loop
from fedllm.check import check, check_ranks
from fedllm.engine import Engine
from fedllm.engines.catalog import engine_of
from fedllm.errors import FedllmError, RunError
from fedllm.evaluation.scores import Scorer, check_metrics
from fedllm.events import DataReported, Emit, Log
from fedllm.experiment import Experiment
from fedllm.federation import Population
from fedllm.folder import Folder, default_folder
from fedllm.ledger import Ledger
from fedllm.lock import locked
from fedllm.session import Session
from fedllm.state import Checkpoints
from fedllm.tasks.model import LoadedModel, load
from fedllm.tree import Tree


@dataclass(frozen=True, eq=False)
class Result:
    """A finished run. `params` are the shared leaves of its last round."""

    folder: Path
    summary: Mapping[str, Any]
    params: Tree


class Interrupted(Exception):
    """The run was stopped from outside; its folder can be resumed."""

    def __init__(self, folder: Path, rounds: int) -> None:
        super().__init__(f"stopped; {rounds} complete rounds are saved in {folder}")
        self.folder, self.rounds = folder, rounds


def run(
    experiment: Experiment,
    *,
    engine: str | Engine = "auto",
    out: str | Path | None = None,
    resume: bool = False,
    name: str = "experiment",
    listeners: Sequence[Emit] = (),
) -> Result:
    """Check, simulate, evaluate, compare and write the run folder. A finished run is returned as it is.

    Args:
        engine: a name (see `fedllm run --help`) or an engine. out: the run folder; default `runs/NAME-HASH8`.
        resume: go on with an unfinished run, if there is one. listeners: are called with each event.

    Raises:
        FedllmError: everything that a user can mend; found before the first checkpoint, it leaves no folder behind.
        Interrupted: Ctrl-C; what is complete is saved.
    """
    check(experiment)
    check_metrics(experiment.evaluation)
    folder = Folder(Path(out) if out is not None else default_folder(experiment, name))
    status = folder.status(experiment)
    if status == "finished":
        saved = _checkpoints(folder, experiment).load()
        return Result(folder.path, folder.read_summary(), {} if saved is None else saved.params)
    if status == "unfinished" and not resume:
        raise RunError(f"{folder.path} holds this experiment, unfinished; go on with --resume")
    chosen, engine_name = engine_of(engine, experiment)
    population = experiment.federation.load(experiment.key)
    check_ranks(experiment, {client: experiment.federation.profile(client) for client in population.clients})
    Scorer.of(experiment, population)
    model = load(experiment.task)
    population = replace(population, report=_data_report(experiment, model, population))
    initial = loop.start(experiment, model.fresh(experiment.key))
    with locked(folder.path), _nothing_half_written(folder, experiment):
        new = not _checkpoints(folder, experiment).rounds()
        if new:
            folder.create(experiment, name)
        ledger = Ledger()
        with closing(Log(folder.events, (ledger, *listeners))) as log:
            session = Session(experiment, folder, model, population, log, ledger, initial)
            with _stopped(session), chosen.open(experiment, folder.memories, log) as call:
                if new:
                    session.begin(engine=engine_name, name=name)
                else:
                    session.resume(listeners)
                session.rounds(call)
                session.comparisons()
                session.finish(engine_name)
        return Result(folder.path, folder.read_summary(), session.state.params)


def _checkpoints(folder: Folder, experiment: Experiment) -> Checkpoints:
    return Checkpoints(folder.checkpoints, experiment.limits.keep_last)


@contextmanager
def _nothing_half_written(folder: Folder, experiment: Experiment) -> Iterator[None]:
    """A run that is refused before its first checkpoint leaves no folder behind."""
    try:
        yield
    except FedllmError:
        if not _checkpoints(folder, experiment).rounds():
            folder.discard()
        raise


@contextmanager
def _stopped(session: Session) -> Iterator[None]:
    """Ctrl-C leaves every complete round on the disk."""
    try:
        yield
    except KeyboardInterrupt:
        session.secure()
        raise Interrupted(session.folder.path, session.state.round) from None


def _data_report(experiment: Experiment, model: LoadedModel, population: Population) -> DataReported:
    """The partition, with what the template cut or dropped.

    Raises:
        RunError: a client is left without anything to train on.
    """
    length, cut, dropped = experiment.work.max_length, 0, 0
    for client, records in population.train.items():
        kept = 0
        for record in records:
            example = model.encode(record, length)
            kept += example is not None
            cut += example is not None and example.cut > 0
        if not kept:
            raise RunError(
                f"no record of {client} keeps a labelled token in {length} tokens; raise the work's max_length"
            )
        dropped += len(records) - kept
    return replace(population.report, cut=cut, dropped=dropped)
