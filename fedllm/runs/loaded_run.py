"""A finished run, opened again: its experiment, model and parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedllm.errors import RunError, nearest
from fedllm.experiment.config_file import build
from fedllm.experiment.record import Experiment
from fedllm.models.loaded_model import LoadedModel, load
from fedllm.runs.artifacts import newcomer, personal_leaves
from fedllm.runs.checkpoints import Checkpoints
from fedllm.runs.folder import Folder
from fedllm.runs.personal_files import own_part, personalised, run_clients
from fedllm.runs.state import ServerState
from fedllm.stages.round_trip import has_personal
from fedllm.tensors.tree import Tree


@dataclass(frozen=True, eq=False)
class LoadedRun:
    """`params` are complete: shared, personal and frozen tensors, and among the components of the factors what was
    added to the frozen weights. `own`: what each client has of its own, those included who came after the run.
    `shared`: the tensors that train, as the server has them. `clients`: those of the run, then those who came after."""

    folder: Folder
    experiment: Experiment
    model: LoadedModel
    state: ServerState
    params: Tree
    own: Mapping[str, Tree]
    shared: Tree
    clients: Sequence[str] = ()

    def params_of(self, client: str) -> Tree:
        """The parameters of the client's model: with its own tensors, or with those that a newcomer begins with."""
        return {**self.params, **self.own_of(client)}

    def own_of(self, client: str) -> Tree:
        """What the client's model has of its own; {} where all clients have one model."""
        return self.own[client] if client in self.own else newcomer(self.experiment, self.state, self.shared, client)


def open_run(path: Path, *, client: str | None = None, best: bool = False) -> LoadedRun:
    """Load a run's experiment, base model and last (or best) parameters, a client's own tensors included.

    Raises:
        RunError: no run or no such checkpoint there, or no such client.
    """
    folder = Folder(path)
    experiment = build(folder.read_experiment())
    state = _state(folder, experiment, best=best)
    came = personalised(folder)
    clients = (*run_clients(folder), *came)
    if client is not None:
        _require_client(path, client, clients, personal=has_personal(experiment.pipeline))
    opened = loaded(folder, experiment, load(experiment.task), state)
    own = {**opened.own, **{name: own_part(folder, name) for name in came}}
    opened = replace(opened, own=own, clients=clients)
    return opened if client is None else replace(opened, params=opened.params_of(client))


def loaded(folder: Folder, experiment: Experiment, model: LoadedModel, state: ServerState) -> LoadedRun:
    """The models that a state of the server and its clients' memories come to.

    Raises:
        RunError: a client's memory is gone or damaged.
    """
    shared = {**model.initial_params(experiment.key), **state.params}
    params = state.base_delta.folded({**model.with_constants(experiment.key).constants, **shared})
    own = personal_leaves(experiment, folder, state, shared)
    return LoadedRun(folder, experiment, model, state, params, own, shared)


def _require_client(path: Path, client: str, clients: Sequence[str], *, personal: bool) -> None:
    """
    Raises:
        RunError: the run has no model of this client's own.
    """
    if not personal:
        raise RunError(
            f"{path} has no personal model of '{client}'; no client of this run has parameters of its own: leave out "
            "--client, or train with a method that keeps some, such as method: fedsa_lora"
        )
    if client not in clients:
        raise RunError(f"{path} has no personal model of '{client}'{nearest(client, clients)}")


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
