"""A client's own conditions: what it holds against every manifest, whoever sends it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedllm.privacy.secure_aggregation.faults import IdentityError, ManifestError
from fedllm.privacy.secure_aggregation.identity import Identity
from fedllm.privacy.secure_aggregation.manifest import Manifest
from fedllm.privacy.secure_aggregation.parameters import corrupt_clients, most_corrupt
from fedllm.privacy.secure_aggregation.primitives import CIPHERS
from fedllm.privacy.secure_aggregation.spent import Marker, SpentInMemory


@dataclass(frozen=True)
class Policy:
    """What a client demands of a round.

    Args:
        peers: the pinned public key of each client that it sums with, by name; its own may be missing.
        min_cohort: clients that a round must begin with.
        min_survivors: clients that a sum must be of.
        corrupt: the fraction of clients that may work with the server, from 0 on and below 1.
        ciphers: masks that it can make.
        spent: where it remembers in which rounds it has masked; by default in memory, which ends with the process.

    Raises:
        ManifestError: a condition that protects nothing, or none that can be met.
    """

    peers: Mapping[str, bytes]
    min_cohort: int = 3
    min_survivors: int = 3
    corrupt: float = 0.1
    ciphers: frozenset[str] = frozenset(CIPHERS)
    spent: Marker = field(default_factory=SpentInMemory)

    def __post_init__(self) -> None:
        for holds, sentence in (
            (
                self.min_cohort >= 2,
                f"min_cohort is {self.min_cohort}; one client alone has no sum to hide in, so ask for 2 or more",
            ),
            (
                self.min_survivors >= 2,
                f"min_survivors is {self.min_survivors}; a sum of one client is its vector, so ask for 2 or more",
            ),
            (0 <= self.corrupt < 1, f"corrupt is {self.corrupt}; it is a fraction from 0 on and below 1"),
            (
                bool(self.ciphers) and self.ciphers <= set(CIPHERS),
                f"ciphers are {sorted(self.ciphers)}; there are {' and '.join(CIPHERS)}",
            ),
        ):
            if not holds:
                raise ManifestError(f"a client's policy cannot be right: {sentence}")


@dataclass(frozen=True)
class Content:
    """What a client is about to send: hash of the model that it started from, hash of the layout, number of entries."""

    model: bytes
    layout: bytes
    length: int


def check_manifest(manifest: Manifest, identity: Identity, policy: Policy, content: Content) -> None:
    """Pass if a client may take part.

    Raises:
        ManifestError: a condition breaks the client's policy, or is about something else than what it has.
        IdentityError: a client of the cohort is not pinned, or its key is another.
        RoundSpentError: the round is not later than the last one that this client masked in.
    """
    check_peers(manifest, identity, policy)
    policy.spent.check(manifest.task, manifest.round)
    where = f"round {manifest.round} of {manifest.task!r}"
    n = len(manifest.cohort)
    for holds, sentence in (
        (n >= policy.min_cohort, f"has {n} clients; this client sums with at least {policy.min_cohort}"),
        (
            manifest.min_survivors >= policy.min_survivors,
            f"would show a sum of {manifest.min_survivors} clients; this client asks for {policy.min_survivors}",
        ),
        (
            manifest.cipher in policy.ciphers,
            f"makes masks by {manifest.cipher}; this client has {', '.join(sorted(policy.ciphers))}; a cohort has one",
        ),
        (manifest.model == content.model, "is about another model than the one this client trained; nothing is sent"),
        (manifest.layout == content.layout, "has another layout of the vector than this client's settings make"),
        (manifest.length == content.length, f"sums {manifest.length:,} entries; this client has {content.length:,}"),
    ):
        if not holds:
            raise ManifestError(f"{where} {sentence}")
    check_threshold(manifest, policy, n)


def check_threshold(manifest: Manifest, policy: Policy, members: int) -> None:
    """Pass if no client of `members` has so many corrupt neighbours that a server which shows two lists of survivors
    could collect both secrets of it: 2 t > k + C.

    As many of the cohort may be corrupt, however few advertise, so that a server gains nothing by leaving others out.

    Raises:
        ManifestError: the threshold is too low.
    """
    k, t = min(manifest.degree, members - 1), manifest.threshold
    most = most_corrupt(members, k, corrupt_clients(len(manifest.cohort), policy.corrupt))
    if 2 * t <= k + most:
        raise ManifestError(
            f"round {manifest.round} of {manifest.task!r} has threshold {t} with {k} neighbours, of whom {most} may be "
            f"corrupt; it must be at least {(k + most) // 2 + 1}, or a server could show two lists of survivors"
        )


def check_peers(manifest: Manifest, identity: Identity, policy: Policy) -> None:
    """Pass if every key of the cohort is the pinned one."""
    where = f"round {manifest.round} of {manifest.task!r}"
    pinned = {**policy.peers, identity.name: identity.public}
    for name, key in manifest.cohort:
        if name not in pinned:
            raise IdentityError(
                f"{where} has the client {name!r}, whose key is not pinned; add it to the peers, or leave it out"
            )
        if pinned[name] != key:
            raise IdentityError(f"{where} has another key of the client {name!r} than the one that is pinned")
    if identity.name not in (name for name, _ in manifest.cohort):
        raise ManifestError(f"{where} does not have this client, {identity.name!r}")
