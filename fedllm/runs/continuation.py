"""Going on from a finished run with more rounds: its parameters, its server's state and its clients' memories.

The new run has a folder of its own, which takes over the log, the newest and the best checkpoint, and the memories.
Where nothing but `rounds` differs, it ends with the bits of one run of all rounds; a learning rate that is scheduled
over the whole run is the exception, and is warned of.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedllm.errors import RunError, config_name, nearest
from fedllm.events import Event, RunStarted, to_json
from fedllm.experiment.config_file import ABOUT, build, difference, dump
from fedllm.experiment.privacy import mechanism_of
from fedllm.experiment.record import Experiment
from fedllm.files import to_json_text
from fedllm.privacy.schemes import FixedSizeScheme
from fedllm.runs import privacy_journal
from fedllm.runs.checkpoints import Checkpoints
from fedllm.runs.fingerprint import Inputs, changed_data, changed_model
from fedllm.runs.folder import Folder
from fedllm.runs.resource_usage import limit_reached
from fedllm.runs.state import ServerState
from fedllm.stages.privacy.dp_ftrl import DpFtrl

FREE = ("rounds", "evaluation", "limits", "work", "demands", "schedule")
FREE_OF_TASK = ("objective", "template", "device", "dtype")
STATE = ("stages", "aggregator", "federation")  # free where neither server nor clients have kept anything
PRIVACY = ["demands", "privacy"]
COHORTS = {"sampling", "failures", "failure_rate", "profiles", "devices"}  # settings of who takes part, and how
MANY = 10**9  # clients: more than any cohort
LEFT_BEHIND = ("data_reported", "privacy_promised", "run_finished", "progress")


@dataclass(frozen=True, eq=False)
class Origin:
    """The run that another one goes on from, at its end."""

    folder: Folder
    experiment: Experiment
    about: Mapping[str, Any]
    state: ServerState

    @property
    def mark(self) -> dict[str, Any]:
        """What the new run's folder says of it."""
        known = {"experiment_hash": self.about["experiment_hash"], "round": self.state.round}
        return {"folder": str(self.folder.path), **known}

    def same(self, mark: Mapping[str, Any] | None) -> bool:
        """Whether a folder's mark is of this run, wherever it lay."""
        return mark is not None and all(mark.get(key) == self.mark[key] for key in ("experiment_hash", "round"))

    def begun(self, experiment: Experiment) -> ServerState:
        """The state that the new run begins with."""
        state, kept = self.state, replace(self.state, pending=())
        if len(state.states) != len(experiment.pipeline):
            kept = replace(kept, states=tuple({} for _ in experiment.pipeline))
        same = self.experiment.evaluation.metrics == experiment.evaluation.metrics
        return (
            kept if same and self.experiment.evaluation.best == experiment.evaluation.best else replace(kept, best=None)
        )


def origin_of(path: Path, experiment: Experiment) -> Origin:
    """A finished run, to go on from with this experiment.

    Raises:
        RunError: there is none, or what has changed leaves nothing to go on from.
    """
    folder = Folder(path)
    if not folder.started:
        runs = [str(other.parent) for other in path.parent.glob("*/experiment.yaml")] if path.parent.is_dir() else []
        raise RunError(f"--continue: {path} is no run folder (it has no experiment.yaml){nearest(str(path), runs)}")
    settings = folder.read_experiment()
    about = settings.get(ABOUT, {})
    before = build(settings)
    if not folder.finished:
        raise RunError(f"--continue: {path} is unfinished; go on with it by --resume")
    saved = Checkpoints(folder.checkpoints, before.limits.keep_last).load()
    if saved is None or folder.read_summary().get("failure"):
        raise RunError(f"--continue: {path} has no result to go on from")
    if experiment.rounds <= saved.round:
        raise RunError(
            f"--continue: {path} has {saved.round} rounds already, and rounds, which counts them, is "
            f"{experiment.rounds}; set it above {saved.round}"
        )
    _refuse(path, before, experiment, saved)
    _refuse_unaccounted(path, before, experiment)
    spent = {(record["round"], record["mark"]): record for record in (*saved.spent, *privacy_journal.read(path))}
    return Origin(folder, before, about, replace(saved, spent=list(spent.values())))


def _refuse(path: Path, before: Experiment, experiment: Experiment, saved: ServerState) -> None:
    """
    Raises:
        RunError: names the setting that has changed, and the reason.
    """
    for text in _differences(before, experiment):
        top, _, rest = text.partition(":")[0].partition(".")
        if top in FREE or (top == "task" and rest.partition(".")[0] in FREE_OF_TASK):
            continue
        if top not in STATE:
            why = "its parameters belong to that model, adapter, scope and seed"
        elif any(saved.states) or saved.remembered or saved.seen or saved.base_delta.steps:
            why = "what its server and its clients have kept belongs to these stages and clients"
        else:
            continue
        raise RunError(f"--continue: {path} cannot be continued with {text}: {why}; put it back, or begin anew")
    if limit := limit_reached(experiment, saved):
        raise RunError(f"--continue: {limit}, which counts the rounds of {path}; raise it")


def _refuse_unaccounted(path: Path, before: Experiment, experiment: Experiment) -> None:
    """
    Raises:
        RunError: the rounds of the old run would not be in the epsilon that the new one states.
    """
    old, new = mechanism_of(before), mechanism_of(experiment)
    if new is None or new.noise_multiplier == 0:
        return
    start, end = f"--continue: {path} cannot be continued with {config_name(new)}:", "put it back, or begin anew"
    if old is None or old.noise_multiplier == 0:
        raise RunError(f"{start} its rounds had no noise, so that no epsilon holds for what they came to; begin anew")
    if type(old) is not type(new):
        raise RunError(f"{start} its rounds had the noise of {config_name(old)}, which is counted otherwise; {end}")
    if experiment.evaluation.private and not before.evaluation.private:
        raise RunError(
            f"{start} its figures were in the clear (evaluation.private: false), outside of the guarantee; keep "
            "evaluation.private: false, so that privacy.json says so"
        )
    kinds = {isinstance(one.federation.scheme(MANY), FixedSizeScheme) for one in (before, experiment)}
    for text in _differences(before, experiment):
        keys = text.partition(":")[0].split(".")
        if keys[0] == "federation" and "sampling" in keys and len(kinds) > 1:
            raise RunError(f"{start} cohorts of a fixed size are counted otherwise than others: {text}; {end}")
        if isinstance(new, DpFtrl) and (keys[0] in ("rounds", "stages", "federation") or keys[:2] == PRIVACY):
            raise RunError(f"{start} its noise was made for a run without this change: {text}; {end}")
        if keys[0] == "federation" and not set(keys[2:3]) & COHORTS:
            raise RunError(f"{start} a client holds other records after this change: {text}; {end}")


def _differences(before: Experiment, experiment: Experiment) -> list[str]:
    old, new = (json.loads(json.dumps(dump(one))) for one in (before, experiment))
    return difference(old, new)


def refuse_another_model(origin: Origin, now: Inputs) -> None:
    """
    Raises:
        RunError: the model has the old one's name and not its content.
    """
    found = changed_model(origin.experiment, origin.about.get("inputs", {}), now)
    if found:
        raise RunError(
            f"--continue: since {origin.folder.path} began, {found[0]} changed, and its parameters belong to what that "
            "was; put it back, or begin anew"
        )


def warnings(origin: Origin, experiment: Experiment, now: Inputs) -> list[str]:
    """What the user of a run that goes on should know."""
    changed = changed_data(origin.about.get("inputs", {}), now)
    told = [
        f"since {origin.folder.path} began, {name} changed: rounds from here on are of what it is now"
        for name in changed
    ]
    schedule = getattr(experiment.work, "lr_schedule", None)
    if schedule is None or schedule.over != "run" or schedule.shape == "constant":
        return told
    return [
        *told,
        f"the learning rate is scheduled over the whole run: in the first {origin.state.round} rounds over "
        f"{origin.experiment.rounds}, from here on over {experiment.rounds}; this is not the same as one run of all",
    ]


def hand_over(origin: Origin, folder: Folder, experiment: Experiment, opening: Sequence[Event]) -> None:
    """Give a new run's folder what it begins with; the newest checkpoint last, for with it the run is there.

    Args:
        opening: the events of the new run's start, which take the place of those of the old one.

    Raises:
        OSError: the disk.
    """
    with folder.events.open("a", encoding="utf-8") as log:
        log.writelines(_log(origin, opening))
    if origin.folder.memories.is_dir():
        shutil.copytree(origin.folder.memories, folder.memories, dirs_exist_ok=True)
    state = origin.begun(experiment)
    checkpoints = Checkpoints(folder.checkpoints, experiment.limits.keep_last)
    if state.best is not None and state.best[0] != state.round:
        best = Checkpoints(origin.folder.checkpoints, 1).load(state.best[0])
        if best is not None:
            checkpoints.save(best)
        else:
            state = replace(state, best=None)
    checkpoints.save(state)


def _log(origin: Origin, opening: Sequence[Event]) -> Iterator[str]:
    """The old log's lines of its rounds, behind the new start. What is of the whole run (its end, its warnings, the
    figures of the base and of baselines) is made anew."""
    with origin.folder.events.open(encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            if record["event"] == "run_started":
                for event in opening:
                    once = {"seconds": record.get("seconds", 0.0)} if isinstance(event, RunStarted) else {}
                    yield to_json_text({"at": record["at"], **to_json(event), **once}) + "\n"
            elif not _of_the_whole(record):
                yield line


def _of_the_whole(record: Mapping[str, Any]) -> bool:
    match record["event"]:
        case "evaluated":
            return bool(record["which"] != "federated")
        case "warned":
            return record.get("round") is None
    return record["event"] in LEFT_BEHIND
