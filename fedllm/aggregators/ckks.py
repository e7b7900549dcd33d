"""CKKS, a homomorphic encryption of approximate numbers, by TenSEAL, which this file alone imports.

Ciphertexts add up without a key. One takes 64 KB for 2,048 values, at 128 bits of security (Microsoft SEAL's table for
a ring of 4,096 and a modulus of 109 bits). Cheon, Kim, Kim and Song 2017, 10.1007/978-3-319-70694-8_15.

A ciphertext that was received is handed to the library's reader only if it has the size of one. The library is C++, and
its reader is trusted as far as that: it checks that a ciphertext is one of this ring.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from fedllm.errors import MissingExtra, WireError

RING, MODULI, SCALE_BITS = 4096, (60, 49), 40
SLOTS = RING // 2  # values of one ciphertext
MOST_BYTES = 70_000  # of one
LARGEST = 2.0**17  # of a sum: 2^57 of 2^60 at this scale
Floats = npt.NDArray[np.float64]


def _library() -> Any:
    try:
        import tenseal
    except ImportError as error:
        raise MissingExtra("tenseal", "homomorphic") from error
    return tenseal


def _new() -> Any:
    library = _library()
    context = library.context(library.SCHEME_TYPE.CKKS, poly_modulus_degree=RING, coeff_mod_bit_sizes=list(MODULI))
    context.global_scale = 2.0**SCALE_BITS
    return context


def check_installed() -> None:
    """
    Raises:
        MissingExtra: TenSEAL is not.
    """
    _library()


@lru_cache(maxsize=1)
def public() -> Any:
    """What adds up ciphertexts of every key, and holds none: its own secret key is thrown away."""
    context = _new()
    context.make_context_public()
    return context


def new_secret() -> bytes:
    """A new secret key, with all that belongs to it."""
    found: bytes = _new().serialize(save_public_key=True, save_secret_key=True, save_galois_keys=False,
                                    save_relin_keys=False)  # fmt: skip
    return found


@lru_cache(maxsize=4)
def secret(data: bytes) -> Any:
    """A secret key, read from a file of one's own. Never from a message."""
    return _library().context_from(data)


def encrypt(key: Any, values: Floats) -> list[bytes]:
    """(n,) values as ciphertexts of `SLOTS` each; the last is filled up with zeros."""
    found = []
    for start in range(0, len(values), SLOTS):
        piece = np.zeros(SLOTS)
        piece[: len(values[start : start + SLOTS])] = values[start : start + SLOTS]
        found.append(bytes(_library().ckks_vector(key, piece.tolist()).serialize()))
    return found


def read(data: bytes) -> Any:
    """A ciphertext that was received.

    Raises:
        WireError: it is none.
    """
    if len(data) > MOST_BYTES:
        raise WireError(f"a ciphertext of {len(data):,} bytes; one has at most {MOST_BYTES:,}")
    try:
        found = _library().ckks_vector_from(public(), data)
        size = found.size()
    except (ValueError, RuntimeError, TypeError) as error:
        raise WireError(f"what was sent is no ciphertext: {type(error).__name__}") from error
    if size != SLOTS:
        raise WireError(f"a ciphertext of {size} values; one has {SLOTS}")
    return found


def added(totals: Sequence[Any] | None, sent: Sequence[bytes]) -> list[Any]:
    """The sum of what was there and what was received.

    Raises:
        WireError: it is no ciphertext, or there are more or fewer than before.
    """
    if totals is not None and len(totals) != len(sent):
        raise WireError(f"{len(sent)} ciphertexts; those before had {len(totals)}")
    fresh = [read(data) for data in sent]
    return fresh if totals is None else [total + one for total, one in zip(totals, fresh, strict=True)]


def decrypt(key: Any, sent: Sequence[bytes], count: int) -> Floats:
    """(count,) values."""
    pieces = []
    for data in sent:
        if len(data) > MOST_BYTES:
            raise WireError(f"a ciphertext of {len(data):,} bytes; one has at most {MOST_BYTES:,}")
        pieces.append(np.array(_library().ckks_vector_from(key, data).decrypt()))
    return np.concatenate(pieces)[:count] if pieces else np.zeros(0)
