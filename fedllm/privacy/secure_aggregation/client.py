"""A client's side of a secure sum: one function for each stage, from a message and the state to the next message.

A state goes through the stages once. Whatever is asked out of turn, a second time or for another round is refused, and
a refusal ends the round for this client: it sends nothing more, and its peers see a client that dropped out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import numpy as np

from fedllm.privacy.secure_aggregation import messages
from fedllm.privacy.secure_aggregation.encoding import Reader
from fedllm.privacy.secure_aggregation.faults import (
    IdentityError,
    MessageError,
    StageError,
    SurvivorsError,
    TooFewError,
)
from fedllm.privacy.secure_aggregation.graph import neighbours
from fedllm.privacy.secure_aggregation.identity import Identity
from fedllm.privacy.secure_aggregation.manifest import Manifest, read_manifest
from fedllm.privacy.secure_aggregation.masks import Mask, apply_masks, apply_to_check
from fedllm.privacy.secure_aggregation.messages import FRAME, Advertisement, Kind, Parcel, Secret
from fedllm.privacy.secure_aggregation.pairs import (
    channel_key,
    mask_key,
    mask_of_seed,
    open_shares,
    seal_shares,
    seed_commitment,
)
from fedllm.privacy.secure_aggregation.policy import Content, Policy, check_manifest, check_threshold
from fedllm.privacy.secure_aggregation.primitives import KEY, digest, exchange_pair, exchanges, random_bytes
from fedllm.privacy.secure_aggregation.rings import CHECK, Vector, check_vector, to_wire
from fedllm.privacy.secure_aggregation.shamir import split


class Stage(IntEnum):
    """What a client has done."""

    ADVERTISED = 1
    SHARED = 2
    MASKED = 3
    AGREED = 4
    DONE = 5  # it has unmasked, or refused to go on


@dataclass
class ClientState:
    """What a client remembers within a round. The secrets are erased when it is done.

    own: its place in the cohort. keys: what each client advertised. peers: its neighbours. channels: the secret that it
    shares with each of them. shares: of each neighbour that shared, its share of the mask secret and of the seed; None
    where the parcel could not be opened.
    """

    manifest: Manifest
    identity: Identity
    policy: Policy
    own: int
    stage: Stage = Stage.ADVERTISED
    channel_secret: bytes = field(default=b"", repr=False)
    mask_secret: bytes = field(default=b"", repr=False)
    seed: bytes = field(default=b"", repr=False)
    channels: dict[int, bytes] = field(default_factory=dict, repr=False)
    bundle: bytes = b""
    keys: dict[int, Advertisement] = field(default_factory=dict)
    peers: list[int] = field(default_factory=list)
    shares: dict[int, tuple[bytes, bytes] | None] = field(default_factory=dict, repr=False)
    survivors: list[int] = field(default_factory=list)

    def erase(self) -> None:
        """Forget every secret of the round."""
        self.stage = Stage.DONE
        self.channel_secret = self.mask_secret = self.seed = b""
        self.shares, self.channels = {}, {}


Given = ParamSpec("Given")
Made = TypeVar("Made")
Step = Callable[Concatenate[ClientState, Given], Made]


def _after(stage: Stage) -> Callable[[Step[Given, Made]], Step[Given, Made]]:
    """A step that is taken once, right after `stage`; where it refuses, the state's secrets are erased."""

    def decorate(step: Step[Given, Made]) -> Step[Given, Made]:
        @wraps(step)
        def call(state: ClientState, /, *args: Given.args, **kwargs: Given.kwargs) -> Made:
            if state.stage != stage:
                raise StageError(
                    f"client {state.identity.name!r} was asked for {Stage(stage + 1).name} after {state.stage.name}; "
                    f"that comes once, after {stage.name}"
                )
            try:
                made = step(state, *args, **kwargs)
            except BaseException:
                state.erase()
                raise
            state.stage = Stage(stage + 1)
            return made

        return call

    return decorate


def advertise(manifest: bytes, identity: Identity, policy: Policy, content: Content) -> tuple[bytes, ClientState]:
    """Stage 1: check the manifest and send two fresh public keys and the commitment to a fresh seed.

    Raises:
        SecureSumError: the bytes are no manifest, or it breaks the policy; see `check_manifest`.
    """
    found = read_manifest(manifest)
    check_manifest(found, identity, policy, content)
    channel_secret, channel = exchange_pair()
    mask_secret, mask_key = exchange_pair()
    state = ClientState(found, identity, policy, found.place(identity.name))
    state.channel_secret, state.mask_secret, state.seed = channel_secret, mask_secret, random_bytes()
    own = Advertisement(channel, mask_key, seed_commitment(found, state.own, state.seed))
    state.keys[state.own] = own
    return messages.frame(Kind.ADVERTISEMENT, found, state.own, (own.to_bytes(),), identity), state


@_after(Stage.ADVERTISED)
def share(state: ClientState, bundle: bytes) -> bytes:
    """Stage 2: check everybody's keys, find the neighbours, and send each of them a share of both secrets.

    Raises:
        MessageError, SignatureError: the bundle is malformed, or a client did not sign its part of it.
        IdentityError: a key stands in it twice, or this client's own is missing or another.
        TooFewError: fewer took part than the policy or the threshold asks for.
    """
    manifest, name = state.manifest, state.identity.name
    keys, state.bundle = read_bundle(bundle, manifest)
    if keys.get(state.own) != state.keys[state.own]:
        raise IdentityError(
            f"the bundle of keys does not have what client {name!r} advertised; another could read its shares"
        )
    check_distinct(keys)
    if len(keys) < state.policy.min_cohort:
        raise TooFewError(
            f"{len(keys)} clients sent keys; client {name!r} sums with at least {state.policy.min_cohort}"
        )
    check_threshold(manifest, state.policy, len(keys))
    state.keys = keys
    state.peers = neighbours(sorted(keys), manifest.degree, state.bundle, {state.own})[state.own]
    if len(state.peers) < manifest.threshold:
        raise TooFewError(f"{len(state.peers)} neighbours of {name!r} sent keys; the threshold is {manifest.threshold}")
    body = state.bundle + messages.join(state.peers, [parcel.to_bytes() for parcel in _parcels(state)])
    return messages.frame(Kind.SHARES, manifest, state.own, (body,), state.identity)


def read_bundle(bundle: bytes, manifest: Manifest) -> tuple[dict[int, Advertisement], bytes]:
    """Everybody's keys, each signed by its owner, and the hash of them all."""
    size, clients = FRAME + Advertisement.size, len(manifest.cohort)
    body = messages.open_sheet(bundle, Kind.BUNDLE, manifest, messages.joined_bytes(clients, size))
    keys = {}
    for place, frame in messages.part(body, size, clients, "the bundle of keys").items():
        sender, found = messages.open_frame(frame, Kind.ADVERTISEMENT, manifest, Advertisement.size)
        if sender != place:
            raise MessageError(f"the bundle of keys has those of client {sender} in the place of client {place}")
        keys[place] = Advertisement.read(found)
    return keys, digest("bundle", body)


def check_distinct(keys: dict[int, Advertisement]) -> None:
    """Pass if no key is used twice, neither by two clients nor for two purposes."""
    owners: dict[bytes, int] = {}
    for place, own in keys.items():
        for key in (own.channel, own.mask, own.commitment):
            if key in owners:
                raise IdentityError(
                    f"clients {owners[key]} and {place} of the cohort sent the same key; each makes its own"
                )
            owners[key] = place


def _parcels(state: ClientState) -> list[Parcel]:
    """Both secrets, split among the neighbours."""
    manifest, told = state.manifest, state.manifest.hash + state.bundle
    holders = [peer + 1 for peer in state.peers]
    of_mask, of_seed = (split(secret, holders, manifest.threshold) for secret in (state.mask_secret, state.seed))
    state.channels = exchanges(state.channel_secret, {peer: state.keys[peer].channel for peer in state.peers})
    parcels = []
    for peer, mask_share, seed_share in zip(state.peers, of_mask, of_seed, strict=True):
        key = channel_key(manifest, state.bundle, state.own, peer, state.channels[peer])
        parcels.append(seal_shares(key, state.own, peer, mask_share, seed_share, told))
    return parcels


def mask(state: ClientState, inbox: bytes, vector: Vector, threads: int = 1) -> bytes:
    """Stage 3: `mask_in_pieces` as one message."""
    return b"".join(mask_in_pieces(state, inbox, vector, threads))


@_after(Stage.SHARED)
def mask_in_pieces(
    state: ClientState, inbox: bytes, vector: Vector, threads: int = 1
) -> tuple[bytes | memoryview, ...]:
    """Stage 3: hide the vector under the client's own mask and one with each neighbour that shared.

        y_u = x_u + PRG(seed_u) + sum_(v < u) PRG(k_uv) - sum_(v > u) PRG(k_uv)   mod 2^bits

    The message comes in pieces, to be sent one after another; with 16 and 32 bits the vector itself is one of them.
    Behind the vector go a few entries of 1, whose sum shows whether all masks were taken off.

    vector: (length,) ring elements; masked in place, so that what was in it is gone.
    The round is marked as spent, on the disk, before this returns.

    Raises:
        VectorError: wrong type, length or range.
        MessageError: a malformed inbox, or a parcel of somebody who is no neighbour.
        TooFewError: fewer neighbours shared than the threshold.
        RoundSpentError: this client has masked in this round.
    """
    manifest, place = state.manifest, state.own
    check_vector(vector, manifest.length, manifest.bits, manifest.bound)
    _read_inbox(state, inbox)
    if len(state.shares) < manifest.threshold:
        raise TooFewError(
            f"{len(state.shares)} neighbours of {state.identity.name!r} shared; the threshold is {manifest.threshold}"
        )
    masks = [Mask(mask_of_seed(manifest, state.bundle, place, state.seed))]
    shared = exchanges(state.mask_secret, {peer: state.keys[peer].mask for peer in state.shares})
    masks += [
        Mask(mask_key(manifest, state.bundle, place, peer, secret), peer < place) for peer, secret in shared.items()
    ]
    state.policy.spent.spend(manifest.task, manifest.round)
    check = np.ones(CHECK, vector.dtype)
    apply_masks(vector, masks, manifest.cipher, threads)
    apply_to_check(check, masks, manifest.cipher, manifest.length)
    body = (to_wire(vector, manifest.bits), to_wire(check, manifest.bits))
    return messages.pieces(Kind.MASKED, manifest, place, body, state.identity)


def _read_inbox(state: ClientState, inbox: bytes) -> None:
    """Open what the neighbours sent. A parcel that does not open is that of a neighbour whose shares are lost: the
    masks with it are made all the same, since it makes them too."""
    manifest, clients = state.manifest, len(state.manifest.cohort)
    body = messages.open_sheet(inbox, Kind.INBOX, manifest, messages.joined_bytes(clients, Parcel.size))
    told = manifest.hash + state.bundle
    for peer, data in messages.part(body, Parcel.size, clients, "the inbox").items():
        if peer not in state.peers:
            raise MessageError(f"the inbox of {state.identity.name!r} has shares of client {peer}, who is no neighbour")
        key = channel_key(manifest, state.bundle, peer, state.own, state.channels[peer])
        state.shares[peer] = open_shares(key, peer, state.own, Parcel.read(data), told)


@_after(Stage.MASKED)
def agree(state: ClientState, survivors: bytes) -> bytes:
    """Stage 4: sign the server's list of those whose masked vectors arrived.

    Raises:
        SurvivorsError: it has fewer than the policy asks for, somebody who sent no keys or shares, or not this
            client.
    """
    manifest, clients = state.manifest, len(state.manifest.cohort)
    body = messages.open_sheet(survivors, Kind.SURVIVORS, manifest, messages.joined_bytes(clients, 0))
    found = list(messages.part(body, 0, clients, "the list of survivors"))
    least = max(manifest.min_survivors, state.policy.min_survivors)
    for holds, sentence in (
        (len(found) >= least, f"has {len(found)} clients; a sum must be of at least {least}"),
        (state.own in found, "does not have this client, whose vector is then not in the sum"),
        (set(found) <= set(state.keys), "has a client that sent no keys"),
        (
            not set(found) & set(state.peers) - set(state.shares),
            "has a neighbour whose shares never came, with whom no mask was made",
        ),
    ):
        if not holds:
            raise SurvivorsError(f"the list of survivors that client {state.identity.name!r} was shown {sentence}")
    state.survivors = found
    return messages.frame(
        Kind.CONSENT, manifest, state.own, (messages.survivors_hash(manifest, found),), state.identity
    )


@_after(Stage.AGREED)
def unmask(state: ClientState, consents: bytes) -> bytes:
    """Stage 5: give out one share for each neighbour: of the seed of a survivor, of the mask secret of one that shared
    and dropped out. Then erase every secret of the round.

    Raises:
        SignatureError, MessageError: the consents are malformed, or not signed.
        SurvivorsError: fewer than the threshold of neighbours signed the list that this client signed.
    """
    manifest = state.manifest
    agreed = _consenting(state, consents)
    if len(agreed) < manifest.threshold:
        raise SurvivorsError(
            f"{len(agreed)} neighbours of client {state.identity.name!r} signed the list of survivors that it "
            f"was shown; the threshold is {manifest.threshold}, so no share is given out"
        )
    owners, shares = [], []
    for peer, pair in state.shares.items():
        if pair is not None:
            secret = Secret.SEED if peer in state.survivors else Secret.MASK
            owners.append(peer)
            shares.append(bytes([secret]) + pair[0 if secret == Secret.MASK else 1])
    state.erase()
    body = messages.join(owners, shares)
    return messages.frame(Kind.UNMASKING, manifest, state.own, (body,), state.identity)


def _consenting(state: ClientState, consents: bytes) -> set[int]:
    """Neighbours among the survivors that signed the very list that this client signed."""
    manifest, clients, size = state.manifest, len(state.manifest.cohort), FRAME + KEY
    body = messages.open_sheet(consents, Kind.CONSENTS, manifest, messages.joined_bytes(clients, size))
    expected, agreed = messages.survivors_hash(manifest, state.survivors), set()
    for place, frame in messages.part(body, size, clients, "the consents").items():
        sender, found = messages.open_frame(frame, Kind.CONSENT, manifest, KEY)
        if sender != place:
            raise MessageError(f"the consents have that of client {sender} in the place of client {place}")
        if Reader(found, "a consent").bytes(KEY) == expected and place in state.peers and place in state.survivors:
            agreed.add(place)
    return agreed
