"""The run folder: who may write where, and what is final."""

from __future__ import annotations

import json
import platform
import shutil
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from fedllm.errors import ConfigError, RunError
from fedllm.experiment.config_file import ABOUT, difference, dump, experiment_hash
from fedllm.experiment.record import Experiment
from fedllm.experiment.yaml import read_yaml, write_yaml
from fedllm.files import sync, write_durably
from fedllm.version import __version__

Status = Literal["new", "unfinished", "finished"]
ELSEWHERE = "choose another folder with --out"


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
        """The resolved experiment, written first: a folder with it holds a run."""
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
    def clients(self) -> Path:
        """The clients' own adapters, each in a folder of the client's name."""
        return self.path / "clients"

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

    def read_experiment(self) -> dict[str, Any]:
        """The resolved experiment as a mapping, `about` included.

        Raises:
            RunError: there is no run, or its file is damaged.
        """
        if not self.started:
            raise RunError(f"{self.path} is no run folder (it has no experiment.yaml)")
        try:
            settings = read_yaml(self.experiment.read_text(encoding="utf-8"))
        except (ConfigError, UnicodeDecodeError):
            settings = None
        if not isinstance(settings, dict):
            raise RunError(f"{self.experiment} is damaged; {ELSEWHERE}")
        return settings

    def status(self, experiment: Experiment) -> Status:
        """How far this experiment has come here.

        Raises:
            RunError: another experiment or other files stand here.
        """
        if not self.started:
            self._refuse_files()
            return "new"
        there = self.read_experiment()
        about = there.pop(ABOUT, {})
        if about.get("experiment_hash") != experiment_hash(experiment):
            differences = difference(there, json.loads(json.dumps(dump(experiment))))
            what = "; ".join(differences[:3]) or f"it was written by fedllm {about.get('versions', {}).get('fedllm')}"
            raise RunError(f"{self.path} holds another experiment ({what}); {ELSEWHERE}")
        return "finished" if self.finished else "unfinished"

    @property
    def about(self) -> dict[str, Any]:
        """What the run's file says beside the experiment: name, hash, versions, inputs, and what it goes on from."""
        about = self.read_experiment().get(ABOUT)
        return about if isinstance(about, dict) else {}

    def create(self, experiment: Experiment, name: str, **more: Any) -> None:
        """Write the resolved experiment: from here on the folder is this run's, and its log begins anew. `more`: for
        `about`."""
        about = {"name": name, "experiment_hash": experiment_hash(experiment), "versions": versions(), **more}
        text = write_yaml({ABOUT: about, **dump(experiment)})
        write_whole(self.experiment, text)
        self.events.unlink(missing_ok=True)
        # those of a private run hold what its noise hides
        self.checkpoints.mkdir(mode=0o700 if experiment.private else 0o777, exist_ok=True)

    def discard(self) -> None:
        """Take away a run that has not come to its first checkpoint."""
        for path in (self.events, self.experiment, _part(self.experiment)):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        with suppress(OSError):
            self.path.rmdir()

    def _refuse_files(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path} is a file; {ELSEWHERE}")
        if self.path.is_dir() and any(path != _part(self.experiment) for path in self.path.iterdir()):
            raise RunError(f"{self.path} holds other files and no run; {ELSEWHERE}")


def default_folder(experiment: Experiment, name: str, continues: Path | None = None) -> Path:
    """`runs/NAME-HASH8`; of a run that goes on from another one `runs/NAME-HASH8-from-HASH8`.

    Raises:
        RunError: there is no such other one.
    """
    own = f"{name}-{experiment_hash(experiment)[:8]}"
    if continues is not None:
        own += f"-from-{str(Folder(continues).about.get('experiment_hash'))[:8]}"
    return Path("runs") / own


def versions() -> dict[str, str]:
    """What the figures are made with."""
    libraries = {name: version(name) for name in ("torch", "transformers", "safetensors")}
    return {"fedllm": __version__, "python": platform.python_version(), **libraries}


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    write_durably(_part(path), text.encode())
    _part(path).replace(path)
    sync(path.parent)


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")
