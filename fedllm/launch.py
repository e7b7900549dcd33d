"""`run`: an experiment from its check to its summary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedllm import loop
from fedllm.catalog import NOUNS, name_of
from fedllm.check import check, check_profiles
from fedllm.engine import Engine
from fedllm.engines.choice import chosen
from fedllm.errors import ConfigError, FedllmError, RunError, nearest
from fedllm.evaluation.scores import Scorer, check_metrics
from fedllm.events import DataReported, Emit, EngineChosen, Log
from fedllm.experiment import Experiment
from fedllm.federation import Population
from fedllm.folder import Folder, default_folder
from fedllm.ledger import Ledger
from fedllm.lock import locked
from fedllm.rehearsal import rehearse, require_positions
from fedllm.session import Session
from fedllm.shift import Shift
from fedllm.spec import Reader, named
from fedllm.state import Checkpoints, Run
from fedllm.tasks.model import LoadedModel, load
from fedllm.tree import Tree
from fedllm.yamltext import read_yaml


@dataclass(frozen=True, eq=False)
class Result:
    """A finished run. `params`: the shared leaves of its last round. `shift`: what was added to the frozen weights."""

    folder: Path
    summary: Mapping[str, Any]
    params: Tree
    shift: Shift = Shift()


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
    asked = engine_of(engine)
    folder = Folder(Path(out) if out is not None else default_folder(experiment, name))
    status = folder.status(experiment)
    if status == "finished":
        return _finished(folder, experiment)
    if status == "unfinished" and not resume:
        raise RunError(f"{folder.path} holds this experiment, unfinished; go on with --resume")
    model, population = _loaded(experiment)
    runner, reason = chosen(asked, experiment, model)
    engine_name = name_of(runner).replace(":", ".").rpartition(".")[2].lower()
    start = loop.start(experiment, model.fresh(experiment.key))
    with locked(folder.path), _nothing_half_written(folder, experiment):
        new = not _checkpoints(folder, experiment).rounds()
        if new:
            folder.create(experiment, name)
        opened = _session(experiment, folder, model, population, start, listeners)
        with opened as session, runner.open(experiment, folder.memories, session.log) as call:
            if new:
                session.begin(engine=engine_name, name=name)
            else:
                session.resume(listeners)
            session.log(EngineChosen(engine_name, reason))
            session.rounds(call)
            session.comparisons()
            session.finish(engine_name)
        return Result(folder.path, folder.read_summary(), session.state.params, session.state.shift)


def engine_of(engine: str | Engine) -> Engine | None:
    """An engine from its name, or from its name with settings (`{batched: {stack: 8}}`); None for "auto".

    Raises:
        ConfigError: an unknown name or setting.
    """
    if not isinstance(engine, str):
        return engine
    if engine == "auto":
        return None
    given = read_yaml(engine)
    name = named(given, "engine")[0]
    if name not in NOUNS[Engine]:
        raise ConfigError(f"unknown engine '{name}'{nearest(name, ['auto', *NOUNS[Engine]])}")
    made: Engine = Reader().component(Engine, given, "engine")
    return made


def _finished(folder: Folder, experiment: Experiment) -> Result:
    """What an earlier process has left."""
    saved = _checkpoints(folder, experiment).load()
    if saved is None:
        return Result(folder.path, folder.read_summary(), {})
    return Result(folder.path, folder.read_summary(), saved.params, saved.shift)


def _loaded(experiment: Experiment) -> tuple[LoadedModel, Population]:
    """Model and data, after all that can be refused about the data without a model.

    Raises:
        FedllmError: they cannot be had, or do not fit each other.
    """
    population = experiment.federation.load(experiment.key)
    profiles = {client: experiment.federation.profile(client) for client in population.clients}
    check_profiles(experiment, profiles)
    Scorer.of(experiment, population)
    model = load(experiment.task)
    rehearse(experiment, model, profiles)
    require_positions(experiment, model, population)
    return model, replace(population, report=_data_report(experiment, model, population))


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
def _session(
    experiment: Experiment,
    folder: Folder,
    model: LoadedModel,
    population: Population,
    start: Run,
    listeners: Sequence[Emit],
) -> Iterator[Session]:
    """A session that writes the log. Ctrl-C leaves every complete round on the disk."""
    ledger = Ledger()
    with closing(Log(folder.events, (ledger, *listeners))) as log:
        session = Session(experiment, folder, model, population, log, ledger, start)
        try:
            yield session
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
        for example in model.encode_all(records, length):
            kept += example is not None
            cut += example is not None and example.cut > 0
        if not kept:
            raise RunError(
                f"no record of {client} keeps a labelled token in {length} tokens; raise the work's max_length"
            )
        dropped += len(records) - kept
    return replace(population.report, cut=cut, dropped=dropped)
