"""A finished run, opened again: its experiment, model and parameters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from fedllm.config import ABOUT, build
from fedllm.errors import RunError, nearest
from fedllm.experiment import Experiment
from fedllm.folder import Folder
from fedllm.outputs import personal_leaves
from fedllm.state import Checkpoints, Run
from fedllm.tasks.model import LoadedModel, load
from fedllm.tree import Tree


@dataclass(frozen=True, eq=False)
class Opened:
    """`params` are complete: shared, personal and frozen leaves."""

    folder: Folder
    experiment: Experiment
    model: LoadedModel
    params: Tree
    state: Run

    def personal(self, client: str) -> bool:
        """True if the client has kept leaves of its own."""
        return bool(personal_leaves(self.experiment, self.folder, self.state).get(client))


def open_run(path: Path, *, client: str | None = None, best: bool = False) -> Opened:
    """Load a run's experiment, base model and last (or best) parameters, a client's own leaves included.

    Raises:
        RunError: no run or no checkpoint there, or no such client.
    """
    folder = Folder(path)
    if not folder.started:
        raise RunError(f"{path} is no run folder (it has no experiment.yaml)")
    spec = yaml.safe_load(folder.experiment.read_text(encoding="utf-8"))
    experiment = build({key: value for key, value in spec.items() if key != ABOUT})
    checkpoints = Checkpoints(folder.checkpoints, experiment.limits.keep_last)
    state = checkpoints.load()
    if state is not None and best and state.best is not None:
        state = checkpoints.load(state.best[0])
    if state is None:
        raise RunError(f"{path} holds no checkpoint yet; finish the run with --resume")
    model = load(experiment.task)
    bound = model.bound(experiment.key)
    params = {**bound.constants, **model.fresh(experiment.key), **state.params}
    if client is not None:
        own = personal_leaves(experiment, folder, state)
        if client not in own:
            known = list(own) or ["none: nothing in this run is personal"]
            raise RunError(f"{path} has no personal model of '{client}'{nearest(client, known)}")
        params |= own[client]
    return Opened(folder, experiment, model, params, state)
