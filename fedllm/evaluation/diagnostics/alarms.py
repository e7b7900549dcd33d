"""Alarms: what a user should know of the last rounds, said in the round in which it begins.

    diverging      agreement < c                      in each of the last n rounds
    losing         min(bias, bias of means) > b       in each of the last n rounds
    stalled        mean loss of the last n rounds >= mean loss of the n rounds before them
    costly         bytes of the last n rounds > g (mean loss of the n rounds before - mean loss of the last n)

The agreement of K clients is 1 + (K - 1) cosine = ||sum_k Delta_k / ||Delta_k|| ||^2 / K: K if all go the same way, 1
if their updates are at right angles, 0 if they cancel. Losses are the cohorts' training losses. An alarm is raised
again if it has ceased in between.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

from fedllm.evaluation.settings import Diagnostics
from fedllm.events import Diagnosed, Event, Resumed, RoundFinished, Warned


@dataclass(frozen=True)
class Point:
    """What alarms know of a round."""

    agreement: float | None = None
    cosine: float | None = None
    bias: float | None = None
    loss: float | None = None
    bytes: int = 0


Alarm = Callable[[Sequence[Point], Diagnostics], str]  # what is wrong after the last of the rounds; "": nothing


@dataclass(eq=False)
class Alarms:
    """Listens to a run's events and says which alarms begin."""

    settings: Diagnostics
    points: dict[int, Point] = field(default_factory=dict)

    def __call__(self, event: Event) -> None:
        """Take one event in."""
        match event:
            case Diagnosed():
                lost = [value for value in (event.bias, event.bias_of_means) if value is not None]
                agreement = None if event.cosine is None else 1 + (len(event.clients) - 1) * event.cosine
                self.points[event.round] = Point(agreement, event.cosine, min(lost, default=None))
            case RoundFinished():
                known = self.points.get(event.round, Point())
                self.points[event.round] = replace(
                    known, loss=_finite(event.loss), bytes=event.bytes_up + event.bytes_down
                )
            case Resumed():
                self.points = {round: point for round, point in self.points.items() if round < event.round}

    def begun(self) -> list[Warned]:
        """The alarms that the newest round raises and the one before it did not."""
        rounds = sorted(self.points)
        points = [self.points[round] for round in rounds]
        found = [(alarm(points, self.settings), alarm(points[:-1], self.settings)) for alarm in ALARMS]
        return [Warned(f"round {rounds[-1] + 1}: {now}", rounds[-1]) for now, before in found if now and not before]


def diverging(points: Sequence[Point], settings: Diagnostics) -> str:
    """The clients pull apart."""
    found = _last([point.agreement for point in points], settings.rounds)
    if not found or max(found) >= settings.agreement:
        return ""
    return (
        f"clients diverge: the mean cosine of their updates is {points[-1].cosine:.2g}, their agreement "
        f"{found[-1]:.2g}, below {settings.agreement:g} {_for(settings)}; take fewer local steps, a lower work.sgd.lr "
        "or a method that corrects drift (scaffold, fedprox)"
    )


def losing(points: Sequence[Point], settings: Diagnostics) -> str:
    """The aggregation is far from the mean of the products, and the mean of the factors is to blame."""
    found = _last([point.bias for point in points], settings.rounds)
    if not found or min(found) <= settings.bias:
        return ""
    return (
        f"the aggregation loses {found[-1]:.0%} of the mean of the clients' products, above {settings.bias:.0%} "
        f"{_for(settings)}; take fewer local steps, or a method without this bias (ffa_lora, rolora, flexlora)"
    )


def stalled(points: Sequence[Point], settings: Diagnostics) -> str:
    """The loss does not fall."""
    found = _halves(points, settings.rounds)
    if found is None or found[1] < found[0]:
        return ""
    return (
        f"the training loss does not fall: {found[1]:.4g} on average over the last {settings.rounds} rounds, "
        f"{found[0]:.4g} over those before; stop here, lower work.sgd.lr, or look at the clients' losses"
    )


def costly(points: Sequence[Point], settings: Diagnostics) -> str:
    """The loss falls by too little for the bytes."""
    found = _halves(points, settings.rounds)
    if found is None or found[1] >= found[0]:
        return ""
    price = sum(point.bytes for point in points[-settings.rounds :]) / (found[0] - found[1])
    if price <= settings.bytes_per_loss:
        return ""
    return (
        f"the bytes outweigh the gain: the last {settings.rounds} rounds cost {price:.2g} bytes for 1 nat of training "
        f"loss, above {settings.bytes_per_loss:.2g}; stop here, or send less (quantize, top_k, a lower rank)"
    )


ALARMS: Sequence[Alarm] = (diverging, losing, stalled, costly)


def _last(values: Sequence[float | None], count: int) -> list[float]:
    """The last `count` values; none if one of them is not known."""
    known = [value for value in values[-count:] if value is not None]
    return known if len(known) == count else []


def _halves(points: Sequence[Point], count: int) -> tuple[float, float] | None:
    """The mean loss of the `count` rounds before the last `count` ones, and of these."""
    known = _last([point.loss for point in points], 2 * count)
    return (fmean(known[:count]), fmean(known[count:])) if known else None


def _finite(value: float | None) -> float | None:
    """As the log has it, so that a run that is resumed hears the same."""
    return value if value is not None and math.isfinite(value) else None


def _for(settings: Diagnostics) -> str:
    return f"for {settings.rounds} rounds" if settings.rounds > 1 else "in this round"
