"""The degree k and the threshold t of a round, from how many clients may be corrupt and how many may drop out.

Up to 64 clients every pair is joined: k = n - 1, and C is the number of corrupt clients. Above, k is the smallest even
degree with which, for the n clients together and by exact hypergeometric tails (Bell et al. 2020, section 3.3),

    privacy    with C the most corrupt neighbours that any client has but with chance 2^-40:   2 t > k + C
               (a server that shows two lists of survivors cannot collect t shares of each kind), and the circle of
               clients is not cut by k / 2 corrupt or absent ones in a row:   n (corrupt + dropout)^(k/2) <= 2^-40
    success    every client keeps t neighbours but with chance 2^-20
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import ceil, comb, floor

from fedllm.privacy.secure_aggregation.faults import ManifestError, TooFewError

COMPLETE = 64  # clients up to which every pair is joined
PRIVACY, SUCCESS = 2.0**-40, 2.0**-20


@dataclass(frozen=True)
class Degree:
    """The degree and the threshold of a graph."""

    degree: int
    threshold: int


def choose(clients: int, corrupt: float = 0.1, dropout: float = 0.1) -> Degree:
    """The degree k and the threshold t.

    corrupt, dropout: fractions of the clients, from 0 on and below 1. Clients that never advertise leave the corrupt
        ones among fewer, which the others check. With 500 clients or more, ask for somewhat more corrupt ones here than
        the clients' policies do.

    Raises:
        ManifestError: fewer than two clients, or a fraction that is none.
        TooFewError: no graph of that many clients stands so much corruption and dropout.
    """
    if clients < 2 or not (0 <= corrupt < 1 and 0 <= dropout < 1):
        raise ManifestError(
            f"{clients} clients, {corrupt} of them corrupt and {dropout} absent, cannot be right; ask for 2 clients "
            "or more, and fractions from 0 on and below 1"
        )
    partial = range(2, clients - 1, 2) if clients > COMPLETE else ()
    for degree in (*partial, clients - 1):
        threshold = least_threshold(clients, degree, corrupt)
        if threshold <= degree and _holds(clients, degree, threshold, corrupt, dropout):
            return Degree(degree, threshold)
    raise TooFewError(
        f"{clients} clients with {corrupt:.0%} corrupt and {dropout:.0%} dropping out have no threshold that keeps "
        "updates secret and lets the round end; ask for more clients, or allow less of either"
    )


def least_threshold(clients: int, degree: int, corrupt: float) -> int:
    """The smallest t with 2 t > k + C."""
    return (degree + most_corrupt(clients, degree, corrupt_clients(clients, corrupt))) // 2 + 1


def corrupt_clients(clients: int, corrupt: float) -> int:
    """How many of a cohort may be corrupt."""
    return ceil(corrupt * clients)


@cache
def most_corrupt(clients: int, degree: int, marked: int) -> int:
    """C: corrupt neighbours that no client exceeds but with chance 2^-40, where `marked` of the clients are corrupt."""
    marked = min(marked, clients - 1)
    if degree >= clients - 1:
        return marked
    above = 0.0
    for count in range(min(marked, degree), 0, -1):
        above += _chance(clients - 1, marked, degree, count)
        if clients * above > PRIVACY:
            return count
    return 0


def _holds(clients: int, degree: int, threshold: int, corrupt: float, dropout: float) -> bool:
    """Whether the circle is not cut, and every client keeps enough neighbours."""
    if degree >= clients - 1:
        return degree - floor(dropout * clients) >= threshold
    absent = ceil(dropout * clients)
    cut = clients * (corrupt + dropout) ** (degree // 2)
    lost = sum(
        _chance(clients - 1, absent, degree, count) for count in range(degree - threshold + 1, min(absent, degree) + 1)
    )
    return cut <= PRIVACY and clients * lost <= SUCCESS


def _chance(population: int, marked: int, drawn: int, hits: int) -> float:
    """Hypergeometric: that exactly `hits` of `drawn` are among the `marked`."""
    if drawn - hits > population - marked:
        return 0.0
    return comb(marked, hits) * comb(population - marked, drawn - hits) / comb(population, drawn)
