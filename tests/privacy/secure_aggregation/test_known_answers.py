"""Primitives against the vectors of their standards."""

from __future__ import annotations

import numpy as np
import pytest

from fedllm.privacy.secure_aggregation import primitives
from fedllm.privacy.secure_aggregation.faults import MessageError, SignatureError
from fedllm.privacy.secure_aggregation.masks import Mask, apply_masks
from fedllm.privacy.secure_aggregation.primitives import AES, CHACHA


def keystream(cipher: str, key: bytes, count: int, start: int = 0) -> bytes:
    return primitives.keystream(cipher, key, start).update(bytes(count))


def test_aes_128_of_fips_197() -> None:
    """From counter 0 on, the first block of keystream is the encryption of zeros, here under the zero key."""
    assert keystream(AES, bytes(16), 16).hex() == "66e94bd4ef8a2c3b884cfa59ca342b2e"


def test_aes_128_ctr_of_sp_800_38a() -> None:
    """F.5.1: the counters of the vector begin at f0f1..ff; a keystream begins at 16 x its counter."""
    key = bytes.fromhex("2b7e151628aed2a6abf7158809cf4f3c")
    counter = int("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff", 16)
    plain = bytes.fromhex("6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51")
    found = keystream(AES, key, 32, 16 * counter)
    assert bytes(a ^ b for a, b in zip(plain, found, strict=True)).hex() == (
        "874d6191b620e3261bef6864990db6ce9806f66b7970fdff8617187bb9fffdff"
    )


def test_chacha20_of_rfc_8439() -> None:
    """Appendix A.1, vectors 1 and 2: zero key and nonce, block counters 0 and 1."""
    first = "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
    second = "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
    assert keystream(CHACHA, bytes(32), 32).hex() == first
    assert keystream(CHACHA, bytes(32), 32, 64).hex() == second


@pytest.mark.parametrize("cipher", [AES, CHACHA])
@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_masks_are_the_keystream_in_one_piece_or_many(cipher: str, dtype: str) -> None:
    key = bytes(range(primitives.MASK_KEY[cipher]))
    length = 300_001  # not a multiple of a block
    expected = np.frombuffer(keystream(cipher, key, length * np.dtype(dtype).itemsize), dtype)
    for threads in (1, 2, 3):
        vector = np.zeros(length, dtype)
        apply_masks(vector, [Mask(key)], cipher, threads)
        assert np.array_equal(vector, expected)
        apply_masks(vector, [Mask(key, add=False)], cipher, threads)
        assert not vector.any()


def test_x25519_of_rfc_7748() -> None:
    """Section 6.1: Bob's keys, and what he shares with Alice."""
    bob = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    alice = bytes.fromhex("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
    public = "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    assert primitives.exchange_public(bob).hex() == public
    shared = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    assert primitives.exchange(bob, alice).hex() == shared


def test_a_point_of_small_order_is_refused() -> None:
    """With the point 0 every secret key shares the same 32 zero bytes."""
    with pytest.raises(MessageError, match="small order"):
        primitives.exchange(primitives.random_bytes(), bytes(32))


def test_ed25519_of_rfc_8032() -> None:
    """Section 7.1, test 1: the empty message."""
    secret = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    public = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
    signature = bytes.fromhex(
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe2"
        "4655141438e7a100b"
    )
    assert primitives.signing_public(secret) == public
    assert primitives.sign(secret, b"") == signature
    primitives.verify(public, signature, b"", "a test")
    with pytest.raises(SignatureError, match="a test does not verify"):
        primitives.verify(public, signature, b"x", "a test")


def test_hkdf_of_rfc_5869() -> None:
    """Appendix A.3: no salt, no info."""
    assert primitives.derive(b"\x0b" * 22, b"", 42).hex() == (
        "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8"
    )


def test_aes_256_gcm_of_the_gcm_specification(monkeypatch: pytest.MonkeyPatch) -> None:
    """Test case 14: zero key, nonce and block."""
    monkeypatch.setattr(primitives, "random_bytes", lambda count: bytes(count))
    sealed = primitives.encrypt(bytes(32), bytes(16), b"")
    assert sealed.hex() == "00" * 12 + "cea7403d4d606b6e074ec5d3baf39d18d0d1c8a799996bf0265b98b5d48ab919"
    assert primitives.decrypt(bytes(32), sealed, b"") == bytes(16)
    assert primitives.decrypt(bytes(32), sealed, b"other") is None
    assert primitives.decrypt(bytes(32), sealed[:5], b"") is None


def test_digests_keep_parts_and_purposes_apart() -> None:
    found = {
        primitives.digest("a", b"bc", b"d"),
        primitives.digest("a", b"b", b"cd"),
        primitives.digest("a", b"bcd"),
        primitives.digest("ab", b"c", b"d"),
    }
    assert len(found) == 4
