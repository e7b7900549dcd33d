"""Frames: what clients send, each signed; and sheets: what the server sends.

    frame  head 4 | kind 1 | manifest hash 32 | sender 2 | body | Ed25519 signature 64 of the hash of all before it
    sheet  head 4 | kind 1 | manifest hash 32 | body

A server's sheets carry no signature: what clients must not take its word for is signed by clients.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from hashlib import sha256

from fedllm.privacy.secure_aggregation.encoding import Reader, number
from fedllm.privacy.secure_aggregation.faults import MessageError
from fedllm.privacy.secure_aggregation.identity import Identity
from fedllm.privacy.secure_aggregation.manifest import Manifest
from fedllm.privacy.secure_aggregation.primitives import KEY, NONCE, SIGNATURE, TAG, digest, verify
from fedllm.privacy.secure_aggregation.shamir import SHARE

HEAD = b"fss\x01"
PLACE = 2  # bytes of a client's place in the cohort
FRONT = len(HEAD) + 1 + KEY  # bytes before the body of a sheet
FRAME = FRONT + PLACE + SIGNATURE  # bytes of a frame around its body
SEALED = NONCE + 2 * SHARE + TAG


class Kind(IntEnum):
    """What a message is."""

    ADVERTISEMENT = 1
    SHARES = 2
    MASKED = 3
    CONSENT = 4
    UNMASKING = 5
    BUNDLE = 11
    INBOX = 12
    SURVIVORS = 13
    CONSENTS = 14


def frame(kind: Kind, manifest: Manifest, sender: int, body: Sequence[bytes | memoryview], identity: Identity) -> bytes:
    """A client's signed message."""
    return b"".join(pieces(kind, manifest, sender, body, identity))


def pieces(
    kind: Kind, manifest: Manifest, sender: int, body: Sequence[bytes | memoryview], identity: Identity
) -> tuple[bytes | memoryview, ...]:
    """A client's signed message in pieces, of which those of the body are not copied."""
    front = HEAD + number(kind, 1) + manifest.hash + number(sender, PLACE)
    return front, *body, identity.sign(frame_hash(front, *body))


def frame_hash(*pieces: bytes | memoryview) -> bytes:
    """What a client signs of a frame."""
    found = sha256(b"fedllm secure sum 1 frame\0")
    for piece in pieces:
        found.update(piece)
    return found.digest()


def sender_of(data: bytes, kind: Kind, manifest: Manifest) -> int:
    """Who a frame says that it is from; nothing is verified.

    Raises:
        MessageError: it is no frame of this kind, of another round, or from nobody in the cohort.
    """
    reader = _front(data, kind, manifest)
    sender = reader.number(PLACE)
    if sender >= len(manifest.cohort):
        raise MessageError(f"{_called(kind)} is from client {sender} of a cohort of {len(manifest.cohort)}")
    return sender


def open_frame(data: bytes, kind: Kind, manifest: Manifest, most: int) -> tuple[int, memoryview]:
    """The sender and the body of a frame whose signature is right.

    most: bytes that a body may have; a longer one is refused before anything is done with it.

    Raises:
        MessageError: malformed, truncated, oversized, or of another round.
        SignatureError: altered, or made by another than it says.
    """
    if len(data) > FRAME + most:
        raise MessageError(f"{_called(kind)} has {len(data):,} bytes; at most {FRAME + most:,} belong to it")
    sender = sender_of(data, kind, manifest)
    reader = Reader(data, _called(kind))
    front, body = (
        reader.take(FRONT + PLACE),
        reader.take(len(data) - FRAME) if len(data) >= FRAME else reader.take(most),
    )
    name, public = manifest.cohort[sender]
    verify(public, reader.bytes(SIGNATURE), frame_hash(front, body), f"{_called(kind)} of client {name!r}")
    return sender, body


def sheet(kind: Kind, manifest: Manifest, body: bytes) -> bytes:
    """A server's message."""
    return HEAD + number(kind, 1) + manifest.hash + body


def open_sheet(data: bytes, kind: Kind, manifest: Manifest, most: int) -> memoryview:
    """The body of a server's message.

    Raises:
        MessageError: malformed, oversized, or of another round.
    """
    if len(data) > FRONT + most:
        raise MessageError(f"{_called(kind)} has {len(data):,} bytes; at most {FRONT + most:,} belong to it")
    _front(data, kind, manifest)
    return memoryview(data)[FRONT:]


def _front(data: bytes, kind: Kind, manifest: Manifest) -> Reader:
    reader = Reader(data, _called(kind))
    if reader.take(len(HEAD)) != HEAD or reader.number(1) != kind:
        raise MessageError(f"{_called(kind)} does not begin like one")
    if reader.take(KEY) != manifest.hash:
        raise MessageError(
            f"{_called(kind)} is not of round {manifest.round} of {manifest.task!r}, or of another manifest"
        )
    return reader


def _called(kind: Kind) -> str:
    """ "the message BUNDLE"."""
    return f"the message {kind.name}"


def join(places: Sequence[int], items: Sequence[bytes]) -> bytes:
    """Items of one size, each behind the place of a client, in ascending order of places, behind their number."""
    pairs = sorted(zip(places, items, strict=True))
    return number(len(pairs), PLACE) + b"".join(number(place, PLACE) + item for place, item in pairs)


def part(data: bytes | memoryview, size: int, clients: int, what: str) -> dict[int, bytes]:
    """What `join` put together: place -> item.

    Raises:
        MessageError: another number of bytes, or places that repeat, are not in order, or not of the cohort.
    """
    reader = Reader(data, what)
    found: dict[int, bytes] = {}
    last = -1
    for _ in range(reader.number(PLACE)):
        place = reader.number(PLACE)
        if not last < place < clients:
            raise MessageError(f"{what} names client {place} after client {last}, of a cohort of {clients}")
        found[place], last = reader.bytes(size), place
    reader.end()
    return found


def joined_bytes(count: int, size: int) -> int:
    """Bytes of `count` joined items."""
    return PLACE + count * (PLACE + size)


@dataclass(frozen=True)
class Advertisement:
    """A client's keys of the round: for the channels to its peers, for the masks, and the commitment to its seed."""

    channel: bytes
    mask: bytes
    commitment: bytes
    size = 3 * KEY

    def to_bytes(self) -> bytes:
        """As it is sent."""
        return self.channel + self.mask + self.commitment

    @classmethod
    def read(cls, data: bytes | memoryview) -> Advertisement:
        """From its bytes."""
        reader = Reader(data, _called(Kind.ADVERTISEMENT))
        found = cls(reader.bytes(KEY), reader.bytes(KEY), reader.bytes(KEY))
        reader.end()
        return found


@dataclass(frozen=True)
class Parcel:
    """Two shares for one holder, encrypted, and the hash of each, by which a wrong share is laid at somebody's door."""

    mask_hash: bytes
    seed_hash: bytes
    sealed: bytes
    size = 2 * KEY + SEALED

    def to_bytes(self) -> bytes:
        """As it is sent."""
        return self.mask_hash + self.seed_hash + self.sealed

    @classmethod
    def read(cls, data: bytes | memoryview) -> Parcel:
        """From its bytes."""
        reader = Reader(data, "a parcel of shares")
        found = cls(reader.bytes(KEY), reader.bytes(KEY), reader.bytes(SEALED))
        reader.end()
        return found


class Secret(IntEnum):
    """Which of a client's two secrets a share is of."""

    MASK = 1  # the secret key of its pairwise masks: of a client that dropped out
    SEED = 2  # of its own mask: of a survivor


def share_hash(owner: int, holder: int, secret: Secret, share: bytes) -> bytes:
    """What stands for a share in a parcel."""
    return digest("share", number(owner, PLACE), number(holder, PLACE), number(secret, 1), share)


def survivors_hash(manifest: Manifest, survivors: Iterable[int]) -> bytes:
    """What clients sign of a list of survivors."""
    return digest("survivors", manifest.hash, *(number(place, PLACE) for place in survivors))
