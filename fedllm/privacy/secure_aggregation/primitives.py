"""The cryptographic primitives, all from the package `cryptography`; keys and secrets are plain bytes.

X25519 (RFC 7748), Ed25519 (RFC 8032), HKDF-SHA256 (RFC 5869), AES-256-GCM (NIST SP 800-38D), AES-128-CTR (NIST SP
800-38A) and ChaCha20 (RFC 8439). Random bytes come from the operating system, through `secrets`.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Mapping
from functools import wraps
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from fedllm.errors import MissingExtra
from fedllm.privacy.secure_aggregation.faults import MessageError, SignatureError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers import CipherContext

KEY = 32  # bytes of an X25519 or Ed25519 key, of a seed and of a hash
SIGNATURE = 64
NONCE = 12
TAG = 16
AES, CHACHA = "aes-128-ctr", "chacha20"
CIPHERS = (AES, CHACHA)
MASK_KEY = {AES: 16, CHACHA: 32}  # bytes

Given = ParamSpec("Given")
Made = TypeVar("Made")


def _needs_cryptography(function: Callable[Given, Made]) -> Callable[Given, Made]:
    """Name the extra to install where the package is absent."""

    @wraps(function)
    def call(*args: Given.args, **kwargs: Given.kwargs) -> Made:
        try:
            return function(*args, **kwargs)
        except ModuleNotFoundError as error:
            raise MissingExtra("cryptography", "secure") from error

    return call


def random_bytes(count: int = KEY) -> bytes:
    """From the operating system's generator."""
    return secrets.token_bytes(count)


def digest(purpose: str, *parts: bytes | memoryview) -> bytes:
    """SHA-256 of a purpose and parts, each behind its length: no two inputs are hashed as the same bytes."""
    found = hashlib.sha256(f"fedllm secure sum 1 {purpose}\0".encode())
    for part in parts:
        found.update(len(part).to_bytes(8, "big"))
        found.update(part)
    return found.digest()


@_needs_cryptography
def exchange_pair() -> tuple[bytes, bytes]:
    """A new X25519 pair: (secret key, public key)."""
    secret = random_bytes()
    return secret, exchange_public(secret)


@_needs_cryptography
def exchange_public(secret: bytes) -> bytes:
    """The X25519 public key of a secret key."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def exchange(secret: bytes, public: bytes) -> bytes:
    """The X25519 shared secret of a secret key and a public key."""
    return exchanges(secret, {0: public})[0]


@_needs_cryptography
def exchanges(secret: bytes, publics: Mapping[int, bytes]) -> dict[int, bytes]:
    """The X25519 shared secrets of a secret key and several public keys.

    Raises:
        MessageError: a public key is a point of small order, with which every secret would be the same.
    """
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

    try:
        own = X25519PrivateKey.from_private_bytes(secret)
        return {peer: own.exchange(X25519PublicKey.from_public_bytes(public)) for peer, public in publics.items()}
    except ValueError as error:
        raise MessageError("a public key is a point of small order; leave its owner out of the round") from error


@_needs_cryptography
def signing_public(secret: bytes) -> bytes:
    """The Ed25519 public key of a secret key."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


@_needs_cryptography
def sign(secret: bytes, message: bytes) -> bytes:
    """An Ed25519 signature."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.from_private_bytes(secret).sign(message)


@_needs_cryptography
def verify(public: bytes, signature: bytes, message: bytes, what: str) -> None:
    """Pass if an Ed25519 signature is right.

    Raises:
        SignatureError: it is not; `what` says of what.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError) as error:
        raise SignatureError(f"the signature of {what} does not verify; it was altered, or made by another") from error


@_needs_cryptography
def derive(secret: bytes, info: bytes, count: int) -> bytes:
    """HKDF-SHA256 without salt: `count` bytes of key for the purpose that `info` names."""
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(SHA256(), count, None, info).derive(secret)


@_needs_cryptography
def encrypt(key: bytes, plain: bytes, bound: bytes) -> bytes:
    """AES-256-GCM under a fresh random nonce: nonce, ciphertext, tag. `bound` is authenticated with it."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    nonce = random_bytes(NONCE)
    return nonce + AESGCM(key).encrypt(nonce, plain, bound)


@_needs_cryptography
def decrypt(key: bytes, sealed: bytes, bound: bytes) -> bytes | None:
    """The plain bytes of `encrypt`; None where they were altered or are meant for another."""
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    try:
        return AESGCM(key).decrypt(sealed[:NONCE], sealed[NONCE:], bound)
    except (InvalidTag, ValueError):
        return None


@_needs_cryptography
def keystream(cipher: str, key: bytes, start: int = 0) -> CipherContext:
    """The keystream of a mask from byte `start` on, a multiple of 64: what the context makes of zeros.

    A key masks one vector of one round, so the nonce is zero.
    """
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import AES128, ChaCha20
    from cryptography.hazmat.primitives.ciphers.modes import CTR

    if cipher == AES:
        return Cipher(AES128(key), CTR((start // 16).to_bytes(16, "big"))).encryptor()
    return Cipher(ChaCha20(key, (start // 64).to_bytes(4, "little") + bytes(12)), None).encryptor()
