"""What a run's events add up to while it runs: how far it is, how fast, and each event in one line."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedllm.errors import counted
from fedllm.events import (
    ClientFailed,
    ClientFinished,
    Evaluated,
    Event,
    MessageSent,
    PersonalEvaluated,
    Progress,
    Resumed,
    RoundFinished,
    RoundStarted,
    RunFinished,
    RunStarted,
    Scores,
    Warned,
)
from fedllm.report.formatting import duration, figure, remaining, size
from fedllm.report.run_history import COMPARED, moment_of_loss


@dataclass
class StepRate:
    """How fast steps are done: from the first step that was seen to the newest."""

    start: float
    first: int
    done: int
    newest: float

    def step(self, done: int, now: float) -> None:
        """`done` steps are complete."""
        self.done, self.newest = done, now

    def left(self, total: int, now: float) -> float | None:
        """Seconds until `total` steps, from the mean time per step; None before the first."""
        if self.done <= self.first:
            return None
        mean = (self.newest - self.start) / (self.done - self.first)
        return max(0.0, mean * (total - self.done) - (now - self.newest))


@dataclass
class RunProgress:
    """What the events so far add up to. `finished` says of each client of this round what came of it."""

    title: str = ""
    rounds: int = 0
    done: int = 0
    closed: dict[int, RoundFinished] = field(default_factory=dict)  # by round, in order
    sent: dict[str, int] = field(default_factory=dict)  # by direction, in the round that is under way
    begun: int | None = None
    cohort: tuple[str, ...] = ()
    finished: dict[str, str] = field(default_factory=dict)
    scores: dict[str, Evaluated] = field(default_factory=dict)
    side_task: Progress | None = None
    pace: StepRate | None = None
    aside_pace: StepRate | None = None

    def see(self, event: Event, now: float) -> None:
        """Take one event in."""
        match event:
            case RunStarted():
                self.title = f"{event.name} \N{MIDDLE DOT} {event.model} \N{MIDDLE DOT} {event.engine}"
                self.rounds = event.rounds
            case Resumed():
                self._go_back(event.round)
            case RoundStarted():
                self.begun, self.cohort = event.round, event.cohort
                self.finished, self.sent, self.side_task = {}, {}, None
                self.pace = self.pace or StepRate(now, event.round, event.round, now)
            case MessageSent() if event.call != "evaluate":
                self.sent = {**self.sent, event.direction: self.sent.get(event.direction, 0) + event.bytes}
            case ClientFinished():
                self.finished = {**self.finished, event.client: "done" if event.loss is None else figure(event.loss)}
            case ClientFailed():
                self.finished = {**self.finished, event.client: "lost"}
            case RoundFinished():
                self._close(event, now)
            case Evaluated():
                self.scores = {**self.scores, event.which: event}
            case Progress():
                self._step_aside(event, now)
            case RunFinished():
                self.cohort, self.side_task = (), None

    def _close(self, event: RoundFinished, now: float) -> None:
        self.done, self.sent = event.round + 1, {}
        self.closed = {**self.closed, event.round: event}
        if self.pace:
            self.pace.step(self.done, now)

    def _go_back(self, start: int) -> None:
        self.done, self.pace, self.sent = start, None, {}
        self.closed = {round: event for round, event in self.closed.items() if round < start}
        self.scores = {
            which: event for which, event in self.scores.items() if which != "federated" or event.round <= start
        }

    @property
    def loss(self) -> float | None:
        """The loss of the newest complete round."""
        return list(self.closed.values())[-1].loss if self.closed else None

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes up and down so far; those of evaluations are not counted."""
        events = self.closed.values()
        up, down = sum(event.bytes_up for event in events), sum(event.bytes_down for event in events)
        return up + self.sent.get("up", 0), down + self.sent.get("down", 0)

    def _step_aside(self, event: Progress, now: float) -> None:
        if self.aside_pace is None or self.side_task is None or self.side_task.what != event.what:
            self.aside_pace = StepRate(now, event.done, event.done, now)
        self.aside_pace.step(event.done, now)
        self.side_task, self.cohort = event, ()


def line(event: Event, scene: RunProgress, now: float) -> str | None:
    """An event in one line, after the scene has taken it in; None for what is not worth one."""
    match event:
        case RunStarted():
            return f"{scene.title}: {counted(event.rounds, 'round')}, {counted(event.clients, 'client')}"
        case Resumed():
            return f"resumed with round {_counted(event.round + 1, scene.rounds)}"
        case RoundFinished():
            left = scene.pace.left(scene.rounds, now) if scene.pace else None
            told = f"clients {event.clients}  up {size(event.bytes_up)}  down {size(event.bytes_down)}"
            tail = f"  left {remaining(left)}" if left is not None and scene.done < scene.rounds else ""
            note = f"  ({event.note})" if event.note else ""
            loss = f"loss {figure(event.loss)}"
            return f"round {_counted(scene.done, scene.rounds)}  {loss}  {told}  {duration(event.seconds)}{tail}{note}"
        case Evaluated():
            return f"{model_label(event)}: {scores_line(event.metrics)}" + (f"  ({event.note})" if event.note else "")
        case PersonalEvaluated():
            return f"own models of {counted(len(event.matrix), 'client')} scored on each other's records"
        case Progress():
            left = scene.aside_pace.left(event.total, now) if scene.aside_pace else None
            tail = f"  left {remaining(left)}" if left is not None and event.done < event.total else ""
            return f"{COMPARED.get(event.what, event.what)} {event.done}/{event.total}{tail}"
        case ClientFailed():
            return f"{moment_of_loss(event)}: lost {event.client}: {event.reason}"
        case Warned():
            return f"warning: {event.text}"
        case RunFinished():
            return f"finished {counted(event.rounds, 'round')} in {duration(event.seconds)}" + (
                f": {event.note}" if event.note else ""
            )
    return None


def _counted(done: int, total: int) -> str:
    """Without the total where nobody has said it."""
    return f"{done}/{total}" if total else str(done)


def model_label(event: Evaluated) -> str:
    """Which model was evaluated, and after which round where that matters."""
    name = COMPARED.get(event.which, event.which)
    return f"{name} after round {event.round}" if event.which == "federated" else name


def scores_line(metrics: Scores) -> str:
    """Every metric and its value."""
    return "  ".join(f"{name} {figure(value)}" for name, value in metrics.items())
