"""What a run uses: bytes sent, time, memory, and whether a limit is reached."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fedllm.errors import counted
from fedllm.events import Event, MessageSent, Resumed, RunStarted
from fedllm.experiment.record import Experiment
from fedllm.runs.privacy_ledger import PrivacyLedger
from fedllm.runs.state import ServerState, Totals


@dataclass(eq=False)
class TrafficMeter:
    """Adds up the serialised bytes of all messages since it was last emptied. A listener of a run's events."""

    up: int = 0
    down: int = 0
    evaluation: int = 0

    def __call__(self, event: Event) -> None:
        """Listen."""
        if not isinstance(event, MessageSent):
            return
        if event.call == "evaluate":
            self.evaluation += event.bytes
        elif event.direction == "up":
            self.up += event.bytes
        else:
            self.down += event.bytes

    def reset(self) -> Totals:
        """The sums; then start anew."""
        totals = Totals(bytes_up=self.up, bytes_down=self.down, evaluation_bytes=self.evaluation)
        self.up = self.down = self.evaluation = 0
        return totals


def elapsed(log: Iterable[tuple[float, Event]]) -> float:
    """Seconds of each process that worked on a run, from its start to its last event, added up."""
    total, began, last = 0.0, None, 0.0
    for at, event in log:
        if began is None or isinstance(event, Resumed):
            before = event.seconds if isinstance(event, RunStarted | Resumed) else 0.0
            total, began = total + before + (0.0 if began is None else last - began), at
        last = at
    return total + (0.0 if began is None else last - began)


def limit_reached(experiment: Experiment, state: ServerState, ledger: PrivacyLedger | None = None) -> str:
    """Why the run ends before its last round; empty if it goes on."""
    totals, limits = state.totals, experiment.limits
    sent = totals.bytes_up + totals.bytes_down
    if state.round >= experiment.rounds:
        return ""
    if limits.bytes is not None and sent >= limits.bytes:
        return f"limits.bytes ({limits.bytes}) was reached with {sent} bytes after {counted(state.round, 'round')}"
    if limits.seconds is not None and totals.seconds >= limits.seconds:
        return f"limits.seconds ({limits.seconds}) was reached after {counted(state.round, 'round')}"
    return "" if ledger is None else ledger.passes_budget(state.round)
