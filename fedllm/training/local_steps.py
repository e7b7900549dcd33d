"""What the works share that step through batches: settings, a device's changes to them, and what a client sends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import torch

from fedllm.errors import ConfigError
from fedllm.messages.context import Profile
from fedllm.messages.update import Part, Update
from fedllm.tensors.tree import Tree
from fedllm.training.base import Outcome
from fedllm.training.client_stack import BufferLayout

COUNTED = ("steps", "tokens", "computed")

S = TypeVar("S", bound="Stepping")


class Stepping(Protocol):
    """Settings with steps or epochs."""

    @property
    def steps(self) -> int | None:
        """Of a round."""
        ...

    @property
    def epochs(self) -> int | None:
        """Of a round, in place of steps."""
        ...

    @property
    def lr(self) -> float:
        """Learning rate."""
        ...


def require_steps(work: Stepping, own: str, sizes: Sequence[str]) -> None:
    """
    Raises:
        ConfigError: not exactly one of steps and epochs, or a size that is not positive; steps may be 0.
    """
    if (work.steps is None) == (work.epochs is None):
        raise ConfigError(f"{own} needs exactly one of steps and epochs; set one of them")
    for name in ("steps", "epochs", *sizes):
        value = getattr(work, name)
        if value is not None and value < (0 if name == "steps" else 1):
            raise ConfigError(f"{own}.{name} is {value}; it must be positive")


def why_idle(work: Stepping, own: str) -> str:
    """Why nothing trains: no steps, or steps of no length; empty if something does."""
    if work.steps == 0:
        return f"{own}.steps is 0"
    return f"{own}.lr is 0" if work.lr == 0 else ""


def on_device(work: S, profile: Profile) -> S:
    """With the profile's steps (instead of steps or epochs), batch size and learning rate, where it has them."""
    found = {"batch_size": profile.batch_size, "lr": profile.lr}
    changes: dict[str, Any] = {name: value for name, value in found.items() if value is not None}
    if profile.steps is not None:
        changes |= {"steps": profile.steps, "epochs": None}
    changed: S = replace(work, **changes)  # type: ignore[type-var]  # works are dataclasses
    return changed


def stacked(trees: Sequence[Tree]) -> Tree:
    """(K, ...) tensors in memory of their own; none of none."""
    if not trees[0]:
        return {}
    layout = BufferLayout.of(trees)
    return layout.stacked(layout.filled(trees))


def outcome(delta: Tree, facts: Mapping[str, float], loss_sum: float, more: Mapping[str, Part] = {}) -> Outcome:
    """A client's update: its delta, mean loss of its steps and counts, and further parts."""
    loss = torch.tensor(loss_sum / max(1, facts["steps"]), dtype=torch.float64)
    counts = {name: torch.tensor(facts[name], dtype=torch.float64) for name in COUNTED}
    parts = {"delta": Part(delta), "metrics": Part({"loss": loss}), "counts": Part(counts, 0.0), **more}
    return Update(parts), facts
