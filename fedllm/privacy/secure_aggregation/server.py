"""The server's side of a secure sum: it collects what clients send, passes on what they need, and adds up in place.

The server keeps one vector, however many clients there are. What arrives twice, late or broken is refused by an error
of this package, and the round goes on without it; a round that falls below the threshold ends with `TooFewError`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from fedllm.privacy.secure_aggregation import messages
from fedllm.privacy.secure_aggregation.client import check_distinct
from fedllm.privacy.secure_aggregation.encoding import Reader
from fedllm.privacy.secure_aggregation.faults import MessageError, StageError, TooFewError
from fedllm.privacy.secure_aggregation.graph import neighbours
from fedllm.privacy.secure_aggregation.manifest import Manifest
from fedllm.privacy.secure_aggregation.messages import Advertisement, Kind, Parcel, Secret, share_hash
from fedllm.privacy.secure_aggregation.primitives import KEY, SIGNATURE, digest
from fedllm.privacy.secure_aggregation.rings import CHECK, Vector, dtype_of, from_wire, wire_bytes
from fedllm.privacy.secure_aggregation.shamir import SHARE


class Stage(IntEnum):
    """What the server is collecting."""

    ADVERTISEMENTS = 1
    SHARES = 2
    MASKED = 3
    CONSENTS = 4
    UNMASKINGS = 5
    FINISHED = 6


@dataclass
class ServerState:
    """What the server remembers within a round; every table is by a client's place in the cohort.

    graph: neighbours of each client that advertised. parcels: (owner, holder) -> parcel. shares: (owner, secret) ->
    holder -> share. blamed: client -> what it did wrong. transcript: hash of every message that was accepted.
    """

    manifest: Manifest
    stage: Stage = Stage.ADVERTISEMENTS
    keys: dict[int, Advertisement] = field(default_factory=dict)
    frames: dict[int, bytes] = field(default_factory=dict)
    bundle: bytes = b""
    graph: dict[int, list[int]] = field(default_factory=dict)
    parcels: dict[tuple[int, int], bytes] = field(default_factory=dict)
    shared: set[int] = field(default_factory=set)
    total: Vector = field(default_factory=lambda: np.empty(0, "<u4"))
    check: Vector = field(default_factory=lambda: np.empty(0, "<u4"))
    survivors: list[int] = field(default_factory=list)
    shares: dict[tuple[int, Secret], dict[int, bytes]] = field(default_factory=dict)
    unmasked: set[int] = field(default_factory=set)
    blamed: dict[int, str] = field(default_factory=dict)
    transcript: bytes = b""


def begin(manifest: Manifest) -> ServerState:
    """A round in which nothing has arrived."""
    return ServerState(manifest, transcript=manifest.hash)


def _accept(
    state: ServerState, stage: Stage, kind: Kind, data: bytes, most: int, known: set[int]
) -> tuple[int, memoryview]:
    """Sender and body of a frame that has its turn, is signed, and is the sender's first; `known` have sent theirs."""
    if state.stage != stage:
        raise StageError(f"the message {kind.name} came while the server collects {state.stage.name}; it is left out")
    sender, body = messages.open_frame(data, kind, state.manifest, most)
    if sender in known:
        raise MessageError(
            f"the message {kind.name} of client {state.manifest.name(sender)!r} came twice; the first counts"
        )
    return sender, body


def _note(state: ServerState, data: bytes | memoryview) -> None:
    state.transcript = digest("transcript", state.transcript, data)


def add_advertisement(state: ServerState, data: bytes) -> str:
    """Stage 1: take in a client's keys. Returns its name.

    Raises:
        MessageError, SignatureError, StageError: not what it should be, or not now.
        IdentityError: a key that another client sent.
    """
    sender, body = _accept(state, Stage.ADVERTISEMENTS, Kind.ADVERTISEMENT, data, Advertisement.size, set(state.keys))
    found = Advertisement.read(body)
    check_distinct({**state.keys, sender: found})
    state.keys[sender], state.frames[sender] = found, bytes(data)
    return state.manifest.name(sender)


def bundle(state: ServerState) -> bytes:
    """End of stage 1: everybody's keys, the same bytes for each client that sent its own.

    Raises:
        TooFewError: too few for a sum.
    """
    _move(state, Stage.ADVERTISEMENTS, Stage.SHARES, len(state.keys))
    body = messages.join(list(state.frames), list(state.frames.values()))
    state.frames, state.bundle = {}, digest("bundle", body)
    state.graph = neighbours(sorted(state.keys), state.manifest.degree, state.bundle)
    _note(state, body)
    return messages.sheet(Kind.BUNDLE, state.manifest, body)


def add_shares(state: ServerState, data: bytes) -> str:
    """Stage 2: take in a client's encrypted shares. Returns its name.

    Raises:
        MessageError, SignatureError, StageError: not what it should be, or not now.
    """
    clients = len(state.manifest.cohort)
    most = KEY + messages.joined_bytes(state.manifest.degree, Parcel.size)
    sender, body = _accept(state, Stage.SHARES, Kind.SHARES, data, most, state.shared)
    if body[:KEY] != state.bundle:
        raise MessageError(f"the shares of client {state.manifest.name(sender)!r} are for another bundle of keys")
    parcels = messages.part(body[KEY:], Parcel.size, clients, "the shares")
    if list(parcels) != state.graph.get(sender):
        raise MessageError(
            f"the shares of client {state.manifest.name(sender)!r} are not one for each of its neighbours"
        )
    state.parcels |= {(sender, holder): parcel for holder, parcel in parcels.items()}
    state.shared.add(sender)
    _note(state, data)
    return state.manifest.name(sender)


def inboxes(state: ServerState) -> dict[str, bytes]:
    """End of stage 2: for each client that shared, the parcels of its neighbours that did.

    Raises:
        TooFewError: too few for a sum.
    """
    _move(state, Stage.SHARES, Stage.MASKED, len(state.shared))
    ring = dtype_of(state.manifest.bits)
    state.total, state.check = np.zeros(state.manifest.length, ring), np.zeros(CHECK, ring)
    found = {}
    for holder in sorted(state.shared):
        owners = [owner for owner in state.graph[holder] if owner in state.shared]
        body = messages.join(owners, [state.parcels[owner, holder] for owner in owners])
        found[state.manifest.name(holder)] = messages.sheet(Kind.INBOX, state.manifest, body)
    return found


def add_masked(state: ServerState, data: bytes) -> str:
    """Stage 3: add a masked vector to the total, in place. Returns its sender's name.

    Raises:
        MessageError, SignatureError, StageError: not what it should be, or not now; the total is as it was.
    """
    manifest = state.manifest
    size = wire_bytes(manifest.length, manifest.bits)
    most = size + wire_bytes(CHECK, manifest.bits)
    sender, body = _accept(state, Stage.MASKED, Kind.MASKED, data, most, set(state.survivors))
    if sender not in state.shared:
        raise MessageError(
            f"client {manifest.name(sender)!r} sent a masked vector and no shares before; it is left out"
        )
    vector, check = (
        from_wire(body[:size], manifest.length, manifest.bits),
        from_wire(body[size:], CHECK, manifest.bits),
    )
    np.add(state.total, vector, out=state.total)
    np.add(state.check, check, out=state.check)
    state.survivors.append(sender)
    _note(state, memoryview(data)[-SIGNATURE:])
    return manifest.name(sender)


def survivors(state: ServerState) -> bytes:
    """End of stage 3: whose vectors are in the total, the same bytes for each of them.

    Raises:
        TooFewError: too few for a sum.
    """
    _move(state, Stage.MASKED, Stage.CONSENTS, len(state.survivors))
    state.survivors.sort()
    body = messages.join(state.survivors, [b""] * len(state.survivors))
    return messages.sheet(Kind.SURVIVORS, state.manifest, body)


def add_consent(state: ServerState, data: bytes) -> str:
    """Stage 4: take in a survivor's signature under the list. Returns its name.

    Raises:
        MessageError, SignatureError, StageError: not what it should be, or not now.
    """
    sender, body = _accept(state, Stage.CONSENTS, Kind.CONSENT, data, KEY, set(state.frames))
    if sender not in state.survivors:
        raise MessageError(f"client {state.manifest.name(sender)!r} signed a list of survivors that it is not on")
    if body != messages.survivors_hash(state.manifest, state.survivors):
        raise MessageError(f"client {state.manifest.name(sender)!r} signed another list of survivors")
    state.frames[sender] = bytes(data)
    return state.manifest.name(sender)


def consents(state: ServerState) -> dict[str, bytes]:
    """End of stage 4: for each client that signed, the signatures of its neighbours.

    Raises:
        TooFewError: too few for a sum.
    """
    _move(state, Stage.CONSENTS, Stage.UNMASKINGS, len(state.frames), state.manifest.threshold + 1)
    found = {}
    for holder in sorted(state.frames):
        signed = [peer for peer in state.graph[holder] if peer in state.frames]
        body = messages.join(signed, [state.frames[peer] for peer in signed])
        found[state.manifest.name(holder)] = messages.sheet(Kind.CONSENTS, state.manifest, body)
    return found


def add_unmasking(state: ServerState, data: bytes) -> str:
    """Stage 5: take in a client's shares of its neighbours' secrets. Returns its name.

    A share that is not the one its owner dealt is left out, and its holder is blamed.

    Raises:
        MessageError, SignatureError, StageError: not what it should be, or not now.
    """
    clients = len(state.manifest.cohort)
    most = messages.joined_bytes(state.manifest.degree, 1 + SHARE)
    sender, body = _accept(state, Stage.UNMASKINGS, Kind.UNMASKING, data, most, state.unmasked)
    if sender not in state.frames:
        raise MessageError(f"client {state.manifest.name(sender)!r} gave out shares without a signed list of survivors")
    found = messages.part(body, 1 + SHARE, clients, "the shares that were given out")
    state.unmasked.add(sender)
    for owner, item in found.items():
        wanted = Secret.SEED if owner in state.survivors else Secret.MASK
        parcel = state.parcels.get((owner, sender))
        reader = Reader(item, "a share")
        kind, share = reader.number(1), reader.bytes(SHARE)
        if parcel is None or kind != wanted or share_hash(owner, sender, wanted, share) != _dealt(parcel, wanted):
            state.blamed[sender] = f"gave out a share of client {state.manifest.name(owner)!r} that it was not dealt"
            continue
        state.shares.setdefault((owner, wanted), {})[sender] = share
    _note(state, data)
    return state.manifest.name(sender)


def _dealt(parcel: bytes, secret: Secret) -> bytes:
    """The hash of the share of a secret in a parcel."""
    found = Parcel.read(parcel)
    return found.mask_hash if secret == Secret.MASK else found.seed_hash


def _move(state: ServerState, stage: Stage, then: Stage, count: int, least: int = 0) -> None:
    """From a stage to the next one, if enough clients are left."""
    if state.stage != stage:
        raise StageError(f"the server was asked to end the stage {stage.name} while it collects {state.stage.name}")
    least = max(least, state.manifest.min_survivors, state.manifest.threshold + 1)
    if count < least:
        state.stage = Stage.FINISHED
        raise TooFewError(
            f"{count} of {len(state.manifest.cohort)} clients of round {state.manifest.round} of "
            f"{state.manifest.task!r} were left after {stage.name}; a sum needs {least}, so the round shows nothing"
        )
    state.stage = then
