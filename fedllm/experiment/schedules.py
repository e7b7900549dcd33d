"""Schedules: which clients the server asks, and when a round ends."""

from __future__ import annotations

from dataclasses import dataclass

from fedllm.messages.traits import Traits


class Schedule:
    """Which clients the server asks, and when a round ends. A frozen dataclass of settings."""

    @property
    def traits(self) -> Traits:
        """What it declares, for `check`: by default that nothing is lost, as where all clients of a round get the same
        parameters from one server."""
        return Traits()


@dataclass(frozen=True)
class Synchronous(Schedule):
    """A round ends when its whole cohort has answered or failed."""
