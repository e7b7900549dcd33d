"""Who takes part in a round, as an accountant knows it.

A scheme is what the run really does. Chance makes a release cheaper only while nobody who sees the release knows who
took part; a scheme whose cohort is known says so by `EveryRound` or `RotationScheme`.

Each scheme is a plain value: `to_json` gives a dictionary of plain values, `scheme_from_json` reads it back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from fedllm.errors import PrivacyError


@dataclass(frozen=True)
class _Plain:
    """A scheme as a dictionary."""

    name: ClassVar[str]

    def to_json(self) -> dict[str, Any]:
        """The scheme's name as "scheme", and its numbers."""
        return {"scheme": self.name, **asdict(self)}


@dataclass(frozen=True)
class EveryRound(_Plain):
    """All take part in every round, or it is known who does: chance hides nobody."""

    name: ClassVar[str] = "every_round"


@dataclass(frozen=True)
class PoissonScheme(_Plain):
    """Each takes part by an independent coin in each round.

    rate: the chance to take part, above 0 and at most 1.
    """

    rate: float
    name: ClassVar[str] = "poisson"

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise PrivacyError(f"the rate of a Poisson scheme is {self.rate!r}; it must be above 0 and at most 1")


@dataclass(frozen=True)
class FixedSizeScheme(_Plain):
    """Exactly `cohort` of `population` take part in each round, uniformly and without replacement."""

    population: int
    cohort: int
    name: ClassVar[str] = "fixed_size"

    def __post_init__(self) -> None:
        if not 1 <= self.cohort <= self.population:
            raise PrivacyError(
                f"a fixed-size scheme draws {self.cohort!r} of {self.population!r}; "
                "the cohort must be at least 1 and at most the population"
            )


@dataclass(frozen=True)
class RotationScheme(_Plain):
    """It is known who takes part, and between the starts of two rounds of one client lie at least `min_separation`
    rounds: with 3, a client of round 1 may come back in round 4. In n rounds each is in at most
    ceil(n / min_separation)."""

    min_separation: int
    name: ClassVar[str] = "rotation"

    def __post_init__(self) -> None:
        if self.min_separation < 1:
            raise PrivacyError(f"a rotation's min_separation is {self.min_separation!r}; it must be 1 or more")

    def participations(self, rounds: int) -> int:
        """The most rounds of `rounds` that one client is in: ceil(rounds / min_separation)."""
        return -(-rounds // self.min_separation)


Scheme = EveryRound | PoissonScheme | FixedSizeScheme | RotationScheme
SCHEMES: Mapping[str, type[Scheme]] = {
    scheme.name: scheme for scheme in (EveryRound, PoissonScheme, FixedSizeScheme, RotationScheme)
}


def scheme_from_json(value: Mapping[str, Any]) -> Scheme:
    """The scheme that `to_json` wrote.

    Raises:
        PrivacyError: no known scheme, or numbers that it does not have.
    """
    given = dict(value)
    name = given.pop("scheme", None)
    if name not in SCHEMES:
        raise PrivacyError(f"{name!r} is not a scheme that the accountant knows; known: {', '.join(sorted(SCHEMES))}")
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in given.values()):
        raise PrivacyError(f"the scheme '{name}' has {given}; its values must be finite numbers")
    try:
        return SCHEMES[name](**given)
    except TypeError as error:
        raise PrivacyError(f"the scheme '{name}' does not have the values {sorted(given)}") from error
