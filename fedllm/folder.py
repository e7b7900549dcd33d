"""The run folder: who may write where, and what is final."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedllm.config import ABOUT, difference, dump, experiment_hash
from fedllm.errors import RunError
from fedllm.experiment import Experiment
from fedllm.state import write_durably


@dataclass(frozen=True)
class Folder:
    """Paths of a run, and its status."""

    path: Path

    @property
    def events(self) -> Path:
        """The event log."""
        return self.path / "events.jsonl"

    @property
    def summary(self) -> Path:
        """Written last: a run with a summary is finished."""
        return self.path / "summary.json"

    @property
    def experiment(self) -> Path:
        """The resolved experiment."""
        return self.path / "experiment.yaml"

    @property
    def checkpoints(self) -> Path:
        """Server checkpoints."""
        return self.path / "checkpoints"

    @property
    def memories(self) -> Path:
        """The clients' memories, in a simulation."""
        return self.checkpoints / "clients"

    @property
    def started(self) -> bool:
        """True if a run lives here."""
        return self.experiment.is_file()

    @property
    def finished(self) -> bool:
        """True if it has come to its end."""
        return self.summary.is_file()

    def read_summary(self) -> dict[str, Any]:
        """The final figures."""
        figures: dict[str, Any] = json.loads(self.summary.read_text(encoding="utf-8"))
        return figures

    def admit(self, experiment: Experiment, *, resume: bool) -> None:
        """Refuse to write where another experiment or an unfinished run stands.

        Raises:
            RunError: says what is there and what to do.
        """
        if not self.started:
            if self.path.is_dir() and any(self.path.iterdir()):
                raise RunError(f"{self.path} holds other files and no run; choose another folder with --out")
            return
        there = yaml.safe_load(self.experiment.read_text(encoding="utf-8"))
        about = there.pop(ABOUT, {})
        if about.get("experiment_hash") != experiment_hash(experiment):
            differences = difference(there, json.loads(json.dumps(dump(experiment))))
            what = "; ".join(differences[:3]) or "it was written by another version"
            raise RunError(f"{self.path} holds another experiment ({what}); choose another folder with --out")
        if not self.finished and not resume:
            raise RunError(f"{self.path} holds this experiment, unfinished; go on with --resume")

    def create(self, experiment: Experiment, versions: dict[str, str], name: str) -> None:
        """Write the resolved experiment: from here on the folder is this run's."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        about = {"name": name, "experiment_hash": experiment_hash(experiment), "versions": versions}
        text = yaml.safe_dump({ABOUT: about, **dump(experiment)}, sort_keys=False, allow_unicode=True)
        write_durably(self.experiment, text.encode())


def default_folder(experiment: Experiment, name: str) -> Path:
    """`runs/NAME-HASH8`."""
    return Path("runs") / f"{name}-{experiment_hash(experiment)[:8]}"
