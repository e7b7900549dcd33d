"""Secret noise: known answers, the law of the discrete Gaussian, and what a stream never tells."""

from __future__ import annotations

import hashlib
import hmac
import math
import struct

import numpy as np
import pytest
from scipy.stats import chi2, kstest, norm

from fedllm.errors import PrivacyError
from fedllm.privacy.noise import BLOCK, Ints, NoiseStream, derive, new_key

KEY = bytes(range(32))
MANY = 1_000_000


def test_derive_has_the_known_answer() -> None:
    text = (
        b"s"
        + struct.pack(">Q", 5)
        + b"noise"
        + b"i"
        + struct.pack(">Q", 2)
        + b"-7"
        + b"b"
        + struct.pack(">Q", 1)
        + b"\0"
    )
    assert derive(KEY, "noise", -7, b"\0") == hmac.new(KEY, text, hashlib.sha256).digest()


def test_other_names_are_another_key() -> None:
    names: list[tuple[str | int | bytes, ...]] = [
        *((), ("",), ("", ""), ("ab",), ("a", "b"), ("b", "a"), (b"ab",), (1,), ("1",), (b"1",), (11,), (1, 1)),
        ("a" + "\0" * 7 + "\1" + "b",),
    ]
    assert len({derive(KEY, *each) for each in names} | {derive(KEY[::-1])}) == len(names) + 1


def test_new_keys_differ() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100 and {len(key) for key in keys} == {32}


def test_bytes_have_the_known_answer() -> None:
    blocks = [hashlib.shake_256(KEY + struct.pack(">Q", place)).digest(BLOCK) for place in range(3)]
    stream = NoiseStream(KEY)
    assert stream.bytes(BLOCK - 3) + stream.bytes(5) + stream.bytes(2 * BLOCK - 2) == b"".join(blocks)


def test_uniforms_have_the_known_answer() -> None:
    words = struct.unpack("<1000Q", hashlib.shake_256(KEY + bytes(8)).digest(BLOCK)[:8000])
    expected = [(2 * (word >> 12) + 1) / 2**53 for word in words]
    stream = NoiseStream(KEY)
    assert [*stream.uniform(3), *stream.uniform(0), *stream.uniform(997)] == expected


@pytest.mark.parametrize("word", [0, 2**64 - 1])
def test_uniforms_are_neither_0_nor_1(word: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NoiseStream, "words", lambda stream, size: np.full(size, word, np.uint64))
    assert 0 < NoiseStream(KEY).uniform(1)[0] < 1


def test_equal_keys_give_equal_noise_and_others_do_not() -> None:
    one, same, other = (NoiseStream(key).discrete_gaussian(1000.0, 5000) for key in (KEY, KEY, KEY[::-1]))
    assert np.array_equal(one, same)
    assert abs(np.corrcoef(one, other)[0, 1]) < 5 / math.sqrt(5000)


def test_a_stream_goes_on() -> None:
    stream = NoiseStream(KEY)
    first, second = stream.discrete_gaussian(1000.0, 5000), stream.discrete_gaussian(1000.0, 5000)
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / math.sqrt(5000)


def p_value(drawn: Ints, sigma: float) -> float:
    """Of Pearson's test against the discrete Gaussian; all values of which fewer than 10 are expected are one cell."""
    support = np.arange(-math.ceil(12 * sigma) - 2, math.ceil(12 * sigma) + 3)
    weights = np.exp(-(support.astype(float) ** 2) / (2 * sigma * sigma))
    expected = drawn.size * weights / weights.sum()
    assert np.abs(drawn).max() <= support[-1]
    counts = np.bincount(drawn - support[0], minlength=support.size).astype(float)
    rare = expected < 10
    counts, expected = (np.append(each[~rare], each[rare].sum()) for each in (counts, expected))
    return float(chi2.sf(((counts - expected) ** 2 / expected).sum(), counts.size - 1))


@pytest.mark.parametrize("sigma", [0.3, 1.0, 1.5, 8.25, 100.0])
def test_the_law_is_the_discrete_gaussian(sigma: float) -> None:
    assert p_value(NoiseStream(derive(KEY, str(sigma))).discrete_gaussian(sigma, MANY), sigma) > 0.001


def test_the_test_of_the_law_finds_a_rounded_gaussian() -> None:
    rounded = np.rint(1.5 * norm.ppf(NoiseStream(KEY).uniform(MANY))).astype(np.int64)
    assert p_value(rounded, 1.5) < 1e-6


@pytest.mark.parametrize("power", [20, 40])
def test_large_noise_is_gaussian_down_to_its_last_bits(power: int) -> None:
    """Mean, variance and kurtosis within five standard errors; the law against the continuous one; the last bits."""
    drawn = NoiseStream(derive(KEY, power)).discrete_gaussian(2.0**power, MANY)
    scaled = drawn / 2.0**power
    assert drawn.dtype == np.int64
    assert abs(scaled.mean()) < 5 / math.sqrt(MANY)
    assert abs(scaled.var() - 1) < 5 * math.sqrt(2 / MANY)
    assert abs((scaled**4).mean() - 3) < 5 * math.sqrt(96 / MANY)
    assert kstest(scaled, norm.cdf).pvalue > 0.001
    last = np.bincount(drawn & 255, minlength=256)
    assert chi2.sf(((last - MANY / 256) ** 2 / (MANY / 256)).sum(), 255) > 0.001
    assert abs(np.corrcoef(scaled[1:], scaled[:-1])[0, 1]) < 5 / math.sqrt(MANY)


def test_no_noise_of_no_values() -> None:
    assert NoiseStream(KEY).discrete_gaussian(1.0, 0).shape == (0,)


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf, 2.0**46])
def test_a_sigma_that_is_none_is_refused(sigma: float) -> None:
    with pytest.raises(PrivacyError, match="must be above 0 and at most"):
        NoiseStream(KEY).discrete_gaussian(sigma, 1)


def test_a_short_key_is_refused_and_a_key_is_never_printed() -> None:
    with pytest.raises(PrivacyError, match="has 31 bytes; it must have 32"):
        NoiseStream(KEY[1:])
    assert KEY.hex() not in repr(NoiseStream(KEY)) and repr(KEY) not in repr(NoiseStream(KEY))
