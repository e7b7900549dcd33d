"""What happened in a run, told from its event log alone.

A log that was resumed holds rounds twice: what was written of a lost round before the `Resumed` marker is
superseded by what comes after it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from fedllm.errors import RunError
from fedllm.events import (
    CheckpointSaved,
    ClientFailed,
    ClientFinished,
    Diagnosed,
    Evaluated,
    Event,
    MessageSent,
    PersonalEvaluated,
    PrivacySpent,
    Resumed,
    RoundFinished,
    RoundStarted,
    RunFinished,
    RunStarted,
    Scores,
    Warned,
    read,
)
from fedllm.report.formatting import finite

COMPARED = {
    "base": "base",
    "local_only": "local-only",
    "fedavg": "FedAvg",
    "federated": "federated",
    "centralised": "centralised",
}
OWN = "own/"  # before a metric: of a model of one client, on that client's own records
E = TypeVar("E", bound=Event)


def effective(events: Iterable[Event]) -> list[Event]:
    """The events that count. `Resumed(r)` drops what came before it of the rounds r, r + 1, ..., the evaluations and
    checkpoints of more than r completed rounds, and the end of the run. Comparisons do not hang on rounds."""
    kept: list[Event] = []
    for event in events:
        if isinstance(event, Resumed):
            kept = [earlier for earlier in kept if not _superseded(earlier, event.round)]
        kept.append(event)
    return kept


def _superseded(event: Event, start: int) -> bool:
    match event:
        case MessageSent(call="evaluate") | ClientFailed(call="evaluate"):
            return event.round > start
        case RoundStarted() | RoundFinished() | MessageSent() | ClientFinished() | ClientFailed() | Diagnosed():
            return event.round >= start
        case PrivacySpent():
            return event.round >= start
        case Warned(round=int(round)):
            return round >= start
        case Evaluated(which="federated") | PersonalEvaluated() | CheckpointSaved():
            return event.round > start
        case RunFinished():
            return True
    return False


@dataclass(frozen=True)
class RunHistory:
    """One run: its effective events, and what stands beside the log (`summary`, `settings` as YAML text)."""

    label: str
    events: tuple[Event, ...]
    summary: Mapping[str, Any]
    settings: str

    def of(self, cls: type[E]) -> list[E]:
        """All events of one type, in order."""
        return [event for event in self.events if isinstance(event, cls)]

    def last(self, cls: type[E]) -> E | None:
        """The newest event of one type."""
        return next((event for event in reversed(self.events) if isinstance(event, cls)), None)

    @property
    def model(self) -> str:
        """The base model's title."""
        started = self.last(RunStarted)
        return started.model if started else str(self.summary.get("model") or "unknown model")

    @property
    def by(self) -> str:
        """The field that `evaluation.by` names; "group" if the log does not tell."""
        started = self.last(RunStarted)
        return str((started.settings.get("evaluation", {}).get("by") if started else None) or "group")

    @property
    def evaluations(self) -> dict[str, Evaluated]:
        """The newest evaluation of each kind, in the order base, local-only, FedAvg, federated, centralised."""
        newest = {event.which: event for event in self.of(Evaluated)}
        return {which: newest[which] for which in COMPARED if which in newest}

    @property
    def figures(self) -> dict[str, dict[str, float | None]]:
        """The newest evaluations, model by model."""
        return by_model({which: event.metrics for which, event in self.evaluations.items()})

    def curve(self, metric: str) -> dict[int, float]:
        """The federated model's `metric` by completed rounds; values that are not finite are left out."""
        return {
            event.round: value
            for event in self.of(Evaluated)
            if event.which == "federated" and finite(value := event.metrics.get(metric))
        }

    @property
    def lost(self) -> list[tuple[str, str, str]]:
        """When, which client and why, for each client that was lost."""
        return [(moment_of_loss(event), event.client, event.reason) for event in self.of(ClientFailed)]

    def total(self, key: str) -> float | None:
        """`seconds`, `bytes_up`, `bytes_down` or `tokens` of the whole run: the summary's, else the rounds' sum."""
        known = self.summary.get("tokens_trained" if key == "tokens" else key)
        if known is not None:
            return float(known)
        rounds = self.of(RoundFinished)
        sums = {
            "seconds": sum(event.seconds for event in rounds),
            "bytes_up": sum(event.bytes_up for event in rounds),
            "bytes_down": sum(event.bytes_down for event in rounds),
            "tokens": sum(event.tokens for event in rounds),
        }
        return sums[key] if rounds else None


def by_model(scores: Mapping[str, Mapping[str, float | None] | None]) -> dict[str, dict[str, float | None]]:
    """Figures per metric under the names of COMPARED, in their order; what clients' models score on their own records
    (`own/METRIC`) under a name of its own."""
    found: dict[str, dict[str, float | None]] = {}
    for which, title in COMPARED.items():
        for name, value in (scores.get(which) or {}).items():
            column = f"{title}, own" if name.startswith(OWN) else title
            found.setdefault(column, {})[name.removeprefix(OWN)] = value
    return found


def moment_of_loss(event: ClientFailed) -> str:
    """In which round, counted from 1, or after which one."""
    if event.call == "evaluate":
        return f"evaluation after round {event.round}"
    return f"round {event.round + 1}"


def client_scores(event: Evaluated, metric: str) -> dict[str, float]:
    """One metric of every client that has it, on the client's own records: `own/METRIC` where a client's model was
    also scored on everybody's."""
    scores: Mapping[str, Scores] = event.clients
    own = {client: found.get(f"{OWN}{metric}", found.get(metric)) for client, found in scores.items()}
    return {client: value for client, value in own.items() if finite(value)}


def client_metrics(event: Evaluated) -> list[str]:
    """The metrics that `client_scores` knows of this evaluation."""
    return list(dict.fromkeys(name.removeprefix(OWN) for found in event.clients.values() for name in found))


def load(folder: Path, *, label: str | None = None) -> RunHistory:
    """Read a run folder. Raises RunError where the log is missing or holds something that is no event."""
    log = folder / "events.jsonl"
    if not log.is_file():
        raise RunError(f"{folder} holds no events.jsonl; name the folder that `fedllm run` wrote")
    try:
        events = effective(event for _, event in read(log))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{log} holds a line that is no event ({error}); remove that line") from error
    started = next((event for event in reversed(events) if isinstance(event, RunStarted)), None)
    experiment = folder / "experiment.yaml"
    if experiment.is_file():
        settings = experiment.read_text(encoding="utf-8")
    else:
        settings = yaml.safe_dump(dict(started.settings), sort_keys=False) if started else ""
    return RunHistory(label or folder.resolve().name, tuple(events), _summary(folder / "summary.json"), settings)


def load_all(folders: Sequence[Path]) -> list[RunHistory]:
    """Several run folders, each under a name of its own: the folder's, or its path where names repeat."""
    if not folders:
        raise RunError("no run folder was named; name at least one")
    names = [folder.resolve().name for folder in folders]
    return [
        load(folder, label=name if names.count(name) == 1 else str(folder))
        for folder, name in zip(folders, names, strict=True)
    ]


def _summary(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path} is not JSON ({error}); remove it, the report does without") from error
    return summary if isinstance(summary, dict) else {}
