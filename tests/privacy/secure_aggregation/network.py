"""A cohort and a server that pass messages in one process, with clients that fall silent where a test says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedllm.privacy.secure_aggregation import client, recovery, server
from fedllm.privacy.secure_aggregation.client import ClientState
from fedllm.privacy.secure_aggregation.faults import SecureSumError
from fedllm.privacy.secure_aggregation.identity import Identity, new_identity
from fedllm.privacy.secure_aggregation.manifest import Manifest
from fedllm.privacy.secure_aggregation.policy import Content, Policy
from fedllm.privacy.secure_aggregation.primitives import AES, digest
from fedllm.privacy.secure_aggregation.recovery import Total
from fedllm.privacy.secure_aggregation.rings import Vector, dtype_of, largest_bound
from fedllm.privacy.secure_aggregation.server import ServerState

MODEL, LAYOUT = digest("test", b"model"), digest("test", b"layout")
STAGES = ("advertise", "share", "mask", "agree", "unmask")
Change = Callable[[str, str, bytes], bytes]  # (stage, client, message) -> what arrives


@dataclass
class Cohort:
    """Clients with identities and policies, the manifest of a round, and the vectors that they sum."""

    identities: dict[str, Identity]
    manifest: Manifest
    policies: dict[str, Policy]
    vectors: dict[str, Vector]
    states: dict[str, ClientState] = field(default_factory=dict)
    refused: dict[str, SecureSumError] = field(default_factory=dict)

    @property
    def content(self) -> Content:
        return Content(self.manifest.model, self.manifest.layout, self.manifest.length)

    def expected(self, names: tuple[str, ...]) -> list[int]:
        """The plain sum."""
        return [sum(int(self.vectors[name][i]) for name in names) for i in range(self.manifest.length)]


def cohort(clients: int, length: int = 5, bits: int = 32, seed: int = 0, **settings: Any) -> Cohort:
    """Clients with random vectors of the whole allowed range, as signed integers."""
    identities = {f"client{i}": new_identity(f"client{i}") for i in range(clients)}
    keys = tuple((name, identity.public) for name, identity in identities.items())
    degree = settings.pop("degree", clients - 1)
    threshold = settings.pop("threshold", None)
    corrupt = settings.pop("corrupt", 0.0)
    if threshold is None:
        threshold = (degree + int(np.ceil(corrupt * clients))) // 2 + 1
    policy = {name: settings.pop(name) for name in ("min_cohort", "ciphers") if name in settings}
    bound = settings.pop("bound", largest_bound(bits, clients))
    manifest = Manifest(
        *("run/train", settings.pop("round", 7), keys, MODEL, LAYOUT, length, degree, threshold),
        *(settings.pop("min_survivors", 2), bits, bound),
        **{"cipher": AES, **settings},
    )
    draw = np.random.default_rng(seed)
    vectors = {name: draw.integers(-bound, bound, length, endpoint=True) for name in identities}
    policies = {
        name: Policy(dict(keys), **{"min_cohort": 2, **policy}, min_survivors=2, corrupt=corrupt) for name in identities
    }
    return Cohort(identities, manifest, policies, vectors)


def encode(cohort: Cohort, name: str) -> Vector:
    """A client's vector in the ring."""
    ring = dtype_of(cohort.manifest.bits)
    return (cohort.vectors[name] % 2 ** (8 * ring.itemsize)).astype(ring)


def same(stage: str, name: str, message: bytes) -> bytes:
    return message


def play(cohort: Cohort, drops: Mapping[str, str] | None = None, change: Change = same) -> Total:
    """A whole round. drops: client -> the stage from which on it is silent. change: what becomes of its messages.

    A client that refuses is silent from then on; its error is in `cohort.refused`.
    """
    state = server.begin(cohort.manifest)
    drops = dict(drops or {})
    to_clients = {name: cohort.manifest.to_bytes() for name in cohort.identities}
    for stage in STAGES:
        for name in list(to_clients):
            if name in drops and STAGES.index(drops[name]) <= STAGES.index(stage):
                continue
            try:
                message = answer(cohort, stage, name, to_clients[name])
            except SecureSumError as error:
                cohort.refused[name], drops[name] = error, stage
                continue
            try:
                deliver(state, stage, change(stage, name, message))
            except SecureSumError as error:
                cohort.refused[name] = error
        to_clients = conclude(state, stage)
    return recovery.finish(state)


def answer(cohort: Cohort, stage: str, name: str, message: bytes) -> bytes:
    """What a client sends in a stage."""
    if stage == "advertise":
        made, cohort.states[name] = client.advertise(
            message, cohort.identities[name], cohort.policies[name], cohort.content
        )
        return made
    if stage == "mask":
        return client.mask(cohort.states[name], message, encode(cohort, name))
    return {"share": client.share, "agree": client.agree, "unmask": client.unmask}[stage](cohort.states[name], message)


def deliver(state: ServerState, stage: str, message: bytes) -> None:
    """Give the server a client's message."""
    {
        "advertise": server.add_advertisement,
        "share": server.add_shares,
        "mask": server.add_masked,
        "agree": server.add_consent,
        "unmask": server.add_unmasking,
    }[stage](state, message)


def conclude(state: ServerState, stage: str) -> dict[str, bytes]:
    """What the server sends each client after a stage."""
    name = state.manifest.name
    if stage == "advertise":
        message = server.bundle(state)
        return {name(place): message for place in sorted(state.keys)}
    if stage == "share":
        return server.inboxes(state)
    if stage == "mask":
        message = server.survivors(state)
        return {name(place): message for place in state.survivors}
    return server.consents(state) if stage == "agree" else {}


def until(cohort: Cohort, stage: str) -> tuple[ServerState, dict[str, bytes]]:
    """A round up to a stage: the server, and what each client is sent for that stage."""
    state = server.begin(cohort.manifest)
    to_clients = {name: cohort.manifest.to_bytes() for name in cohort.identities}
    for earlier in STAGES[: STAGES.index(stage)]:
        for name, message in to_clients.items():
            deliver(state, earlier, answer(cohort, earlier, name, message))
        to_clients = conclude(state, earlier)
    return state, to_clients
