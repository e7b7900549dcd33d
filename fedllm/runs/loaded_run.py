"""A finished run, opened again: its experiment, model and parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedllm.errors import RunError, nearest
from fedllm.experiment.config_file import build
from fedllm.experiment.record import Experiment
from fedllm.models.loaded_model import LoadedModel, load
from fedllm.runs.artifacts import personal_leaves
from fedllm.runs.checkpoints import Checkpoints
from fedllm.runs.folder import Folder
from fedllm.runs.state import ServerState
from fedllm.tensors.tree import Tree


@dataclass(frozen=True, eq=False)
class LoadedRun:
    """`params` are complete: shared, personal and frozen tensors, and among the components of the factors what was
    added to the frozen weights. `own`: what each client has kept to itself."""

    folder: Folder
    experiment: Experiment
    model: LoadedModel
    state: ServerState
    params: Tree
    own: Mapping[str, Tree]

    def params_of(self, client: str) -> Tree:
        """The parameters with the client's own tensors, where it has any."""
        return {**self.params, **self.own.get(client, {})}


def open_run(path: Path, *, client: str | None = None, best: bool = False) -> LoadedRun:
    """Load a run's experiment, base model and last (or best) parameters, a client's own tensors included.

    Raises:
        RunError: no run or no such checkpoint there, or no such client.
    """
    folder = Folder(path)
    experiment = build(folder.read_experiment())
    state = _state(folder, experiment, best=best)
    own = personal_leaves(experiment, folder, state)
    if client is not None and client not in own:
        what = nearest(client, own) if own else "; no client of this run has parameters of its own"
        raise RunError(f"{path} has no personal model of '{client}'{what}")
    model = load(experiment.task)
    leaves = {**model.with_constants(experiment.key).constants, **model.initial_params(experiment.key), **state.params}
    params = state.base_delta.folded(leaves)
    opened = LoadedRun(folder, experiment, model, state, params, own)
    return opened if client is None else LoadedRun(folder, experiment, model, state, opened.params_of(client), own)


def _state(folder: Folder, experiment: Experiment, *, best: bool) -> ServerState:
    checkpoints = Checkpoints(folder.checkpoints, experiment.limits.keep_last)
    last = checkpoints.load()
    if last is None:
        raise RunError(f"{folder.path} holds no checkpoint yet; finish the run with --resume")
    if not best:
        return last
    if last.best is None:
        raise RunError(f"{folder.path} was never evaluated, so no checkpoint of it is the best one; leave out --best")
    chosen = checkpoints.load(last.best[0])
    if chosen is None:
        raise RunError(f"{folder.path} has lost the checkpoint of its best round; leave out --best")
    return chosen
