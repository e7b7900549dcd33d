"""A release: one noised output that somebody outside of the trusted part sees, as plain values.

The number of times that a release was made stands beside it: a ledger is a mapping from release to count.

| kind | what leaves | `noise_multiplier` | neighbours |
| --- | --- | --- | --- |
| gaussian | a noised sum of client updates, each clipped to C | std / C | one client more or less |
| correlated | all sums of a run with correlated noise | std / (sensitivity x C) | one client's updates or zeros |
| local | one client's own noised update | std / C | any two updates of the ball: 2 C apart |
| skellam | a secure sum of integers that clients have noised | std of the sum / C | one client's update or zeros |
| example | `steps` noised local steps of one client, each example clipped to C | std / C | one example more or less |

Where the scheme is `FixedSizeScheme`, neighbours differ in one replaced client or example: 2 C apart. The accountant
knows this; `noise_multiplier` is std / C in every case.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from fedllm.errors import PrivacyError
from fedllm.privacy.schemes import (
    EveryRound,
    FixedSizeScheme,
    PoissonScheme,
    RotationScheme,
    Scheme,
    scheme_from_json,
)

Kind = Literal["gaussian", "correlated", "local", "skellam", "example"]
Relation = Literal["add-remove", "replace-one"]
Unit = Literal["client", "example"]

LEAST_LEVELS = 16  # of a grid from 0 to the clip
KINDS: tuple[str, ...] = get_args(Kind)
ALLOWED: Mapping[str, tuple[type[Scheme], ...]] = {
    "gaussian": (EveryRound, PoissonScheme, FixedSizeScheme, RotationScheme),
    "correlated": (EveryRound, RotationScheme),  # its sensitivity counts who comes back when, and no coins
    "local": (EveryRound, RotationScheme),  # whose update it is is known
    "skellam": (EveryRound, RotationScheme),  # the server knows whose updates are in a sum
    "example": (EveryRound, PoissonScheme, FixedSizeScheme),
}


@dataclass(frozen=True)
class Release:
    """One noised output.

    Args:
        kind: see the module.
        noise_multiplier: standard deviation of the noise over the clip norm C, for `correlated` over sensitivity x C.
            0 is no noise, whose epsilon is infinite.
        scheme: who takes part; for `example`, which of a client's examples are in a step.
        steps: noised steps in one release; only `example` has more than 1.
        levels: of `skellam`, grid steps from 0 to C; 0 for all others, whose noise is as good as continuous.

    Raises:
        PrivacyError: unknown kind or scheme, a scheme that this kind cannot have, a number out of its range.
    """

    kind: Kind
    noise_multiplier: float
    scheme: Scheme
    steps: int = 1
    levels: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise PrivacyError(f"a release is of kind {self.kind!r}; known kinds: {', '.join(KINDS)}")
        if not isinstance(self.scheme, ALLOWED[self.kind]):
            names = ", ".join(scheme.name for scheme in ALLOWED[self.kind])
            scheme = getattr(self.scheme, "name", repr(self.scheme))
            raise PrivacyError(f"a release of kind '{self.kind}' has the scheme {scheme}; it may have {names}")
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            raise PrivacyError(f"a release has noise_multiplier {self.noise_multiplier!r}; it must be 0 or more")
        if (self.kind == "skellam") != (self.levels >= LEAST_LEVELS):
            raise PrivacyError(
                f"a release of kind '{self.kind}' has {self.levels!r} levels; 'skellam' has {LEAST_LEVELS} or more, "
                "all others 0"
            )
        if self.steps < 0 or (self.steps != 1 and self.kind != "example"):
            raise PrivacyError(f"a release of kind '{self.kind}' has {self.steps!r} steps; only 'example' has several")

    @property
    def relation(self) -> Relation:
        """Which data sets are neighbours."""
        replaced = self.kind == "local" or isinstance(self.scheme, FixedSizeScheme)
        return "replace-one" if replaced else "add-remove"

    @property
    def unit(self) -> Unit:
        """What neighbours differ in."""
        return "example" if self.kind == "example" else "client"

    def repeated(self, times: int) -> Release:
        """The release that stands for `times` releases of one round with the same draw of who took part.

        A round that is run again draws the same cohort, so its releases are no independent draws. Together they are one
        output with noise of 1 / sqrt(times).
        """
        return replace(self, noise_multiplier=self.noise_multiplier / math.sqrt(times))

    def to_json(self) -> dict[str, Any]:
        """Plain values, from which `release_from_json` makes an equal release."""
        return {
            "kind": self.kind,
            "noise_multiplier": self.noise_multiplier,
            "scheme": self.scheme.to_json(),
            "steps": self.steps,
            **({"levels": self.levels} if self.levels else {}),
        }


def release_from_json(value: Mapping[str, Any]) -> Release:
    """The release that `to_json` wrote.

    Raises:
        PrivacyError: a key too few or too many, or a value that no release has.
    """
    try:
        return Release(**{**value, "scheme": scheme_from_json(value["scheme"])})
    except (KeyError, TypeError) as error:
        raise PrivacyError(f"a release has {sorted(value)}; it needs kind, noise_multiplier and scheme") from error


def ledger_to_json(releases: Mapping[Release, int]) -> list[dict[str, Any]]:
    """Each release with its `count`."""
    return [{**release.to_json(), "count": count} for release, count in releases.items()]


def ledger_from_json(rows: Iterable[Mapping[str, Any]]) -> dict[Release, int]:
    """Releases and counts; equal releases are added up."""
    ledger: dict[Release, int] = {}
    for row in rows:
        release = release_from_json({key: value for key, value in row.items() if key != "count"})
        ledger[release] = ledger.get(release, 0) + int(row.get("count", 1))
    return ledger
