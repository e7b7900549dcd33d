"""Keys of a pair of clients, and of a client with itself.

Every key is HKDF-SHA256 with the hash of the manifest (protocol version, task, round, model, cohort), the hash of the
bundle of all keys, the purpose and the clients. Two clients that were told different things derive different keys, so
their masks do not cancel and the server is left with noise.
"""

from __future__ import annotations

from fedllm.privacy.secure_aggregation.encoding import number
from fedllm.privacy.secure_aggregation.manifest import Manifest
from fedllm.privacy.secure_aggregation.messages import PLACE, Parcel, Secret, share_hash
from fedllm.privacy.secure_aggregation.primitives import KEY, MASK_KEY, decrypt, derive, digest, encrypt, exchange
from fedllm.privacy.secure_aggregation.shamir import SHARE


def key_info(purpose: str, manifest: Manifest, bundle: bytes, first: int, second: int) -> bytes:
    """What a key is for, and all that its owners were told."""
    return digest(purpose, manifest.hash, bundle, number(first, PLACE), number(second, PLACE))


def mask_of_pair(manifest: Manifest, bundle: bytes, own: tuple[int, bytes], peer: tuple[int, bytes]) -> bytes:
    """The key of the mask that two clients share: (own place, own secret) and (peer's place, peer's public key)."""
    return mask_key(manifest, bundle, own[0], peer[0], exchange(own[1], peer[1]))


def mask_key(manifest: Manifest, bundle: bytes, first: int, second: int, shared: bytes) -> bytes:
    """The key of the mask that two clients share, from their shared secret."""
    low, high = sorted((first, second))
    return derive(shared, key_info("pairwise mask", manifest, bundle, low, high), MASK_KEY[manifest.cipher])


def mask_of_seed(manifest: Manifest, bundle: bytes, own: int, seed: bytes) -> bytes:
    """The key of a client's own mask."""
    return derive(seed, key_info("own mask", manifest, bundle, own, own), MASK_KEY[manifest.cipher])


def seed_commitment(manifest: Manifest, own: int, seed: bytes) -> bytes:
    """What shows later that a recovered seed is the one that was meant."""
    return digest("seed", manifest.hash, number(own, PLACE), seed)


def channel_key(manifest: Manifest, bundle: bytes, sender: int, receiver: int, shared: bytes) -> bytes:
    """The key of the one parcel that a client sends to a peer."""
    return derive(shared, key_info("channel", manifest, bundle, sender, receiver), KEY)


def seal_shares(key: bytes, sender: int, receiver: int, of_mask: bytes, of_seed: bytes, told: bytes) -> Parcel:
    """Two shares of the sender's for the receiver. told: hash of the manifest and hash of the bundle."""
    hashes = (
        share_hash(sender, receiver, Secret.MASK, of_mask),
        share_hash(sender, receiver, Secret.SEED, of_seed),
    )
    return Parcel(*hashes, encrypt(key, of_mask + of_seed, _bound(sender, receiver, told, *hashes)))


def open_shares(key: bytes, sender: int, receiver: int, parcel: Parcel, told: bytes) -> tuple[bytes, bytes] | None:
    """The two shares of a parcel: of the mask secret and of the seed.

    None where the parcel was altered, is for another, or its hashes are not those of its shares.
    """
    plain = decrypt(key, parcel.sealed, _bound(sender, receiver, told, parcel.mask_hash, parcel.seed_hash))
    if plain is None:
        return None
    of_mask, of_seed = plain[:SHARE], plain[SHARE:]
    hashes = (
        share_hash(sender, receiver, Secret.MASK, of_mask),
        share_hash(sender, receiver, Secret.SEED, of_seed),
    )
    return (of_mask, of_seed) if hashes == (parcel.mask_hash, parcel.seed_hash) else None


def _bound(sender: int, receiver: int, told: bytes, mask_hash: bytes, seed_hash: bytes) -> bytes:
    """What is authenticated with the shares."""
    return b"".join((told, number(sender, PLACE), number(receiver, PLACE), mask_hash, seed_hash))
