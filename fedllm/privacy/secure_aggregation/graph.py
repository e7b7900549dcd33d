"""Who shares secrets and masks with whom.

A Harary graph of even degree k over a random circle of the clients: each is joined to the k/2 that follow it and the
k/2 that precede it (Bell et al. 2020, section 3.1). The circle is sorted by a hash of the bundle of all keys, which the
clients compute themselves, so that the server cannot choose a client's neighbours. With k of at least n - 1, all pairs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from fedllm.privacy.secure_aggregation.primitives import digest


def neighbours(
    members: Sequence[int], degree: int, seed: bytes, owners: Collection[int] | None = None
) -> dict[int, list[int]]:
    """Client -> its neighbours, both by their places in the cohort and in ascending order.

    owners: whose are wanted; default: everybody's.
    """
    owners = members if owners is None else owners
    if degree >= len(members) - 1:
        return {own: [other for other in members if other != own] for own in owners}
    circle = sorted(members, key=lambda member: digest("circle", seed, member.to_bytes(2, "big")))
    steps = [step for step in range(-(degree // 2), degree // 2 + 1) if step]
    return {
        own: sorted(circle[(place + step) % len(circle)] for step in steps)
        for place, own in enumerate(circle)
        if own in owners
    }
