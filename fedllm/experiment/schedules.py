"""Who talks when."""

from __future__ import annotations

from dataclasses import dataclass


class Schedule:
    """Who talks when. A frozen dataclass of settings."""


@dataclass(frozen=True)
class Synchronous(Schedule):
    """A round ends when its whole cohort has answered or failed."""
