"""The degree and the threshold, the graph, and the ring."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from fedllm.privacy.secure_aggregation.faults import ManifestError, TooFewError, VectorError
from fedllm.privacy.secure_aggregation.graph import neighbours
from fedllm.privacy.secure_aggregation.parameters import choose
from fedllm.privacy.secure_aggregation.rings import (
    check_vector,
    choose_ring,
    dtype_of,
    from_wire,
    largest_bound,
    signed,
    to_wire,
    wire_bytes,
)

# (clients, corrupt, dropout) -> (k, t), computed apart from this code by hypergeometric tails
TABLE = {
    (64, 0.2, 0.2): (63, 39),
    (100, 0.05, 0.05): (30, 18),
    (100, 0.1, 0.1): (42, 27),
    (100, 0.1, 0.2): (54, 33),
    (100, 0.2, 0.2): (72, 47),
    (200, 0.05, 0.05): (30, 21),
    (200, 0.1, 0.1): (56, 39),
    (200, 0.1, 0.2): (88, 55),
    (200, 0.2, 0.2): (118, 80),
    (500, 0.05, 0.05): (44, 31),
    (500, 0.1, 0.1): (82, 57),
    (500, 0.1, 0.2): (154, 98),
    (500, 0.2, 0.2): (220, 150),
    (1000, 0.05, 0.05): (52, 37),
    (1000, 0.1, 0.1): (96, 67),
    (1000, 0.1, 0.2): (196, 125),
    (1000, 0.2, 0.2): (298, 203),
}


@pytest.mark.parametrize(("asked", "expected"), TABLE.items(), ids=str)
def test_degree_and_threshold(asked: tuple[int, float, float], expected: tuple[int, int]) -> None:
    found = choose(*asked)
    assert (found.degree, found.threshold) == expected


@pytest.mark.parametrize("clients", [3, 5, 10, 33, 64])
def test_small_cohorts_are_complete_and_two_lists_never_both_pass(clients: int) -> None:
    found = choose(clients, corrupt=0.1, dropout=0.0)
    assert found.degree == clients - 1
    assert 2 * found.threshold > found.degree + int(np.ceil(0.1 * clients)) >= 2 * (found.threshold - 1)


def test_too_much_corruption_is_refused() -> None:
    with pytest.raises(TooFewError, match="10 clients with 50% corrupt and 40% dropping out"):
        choose(10, corrupt=0.5, dropout=0.4)
    with pytest.raises(TooFewError, match="2 clients"):
        choose(2)
    for wrong in ((1, 0.1, 0.1), (10, 1.0, 0.0), (10, 0.1, -0.1), (10, float("nan"), 0.0)):
        with pytest.raises(ManifestError, match="cannot be right; ask for 2 clients"):
            choose(*wrong)


def test_the_graph_is_regular_symmetric_and_moves_with_its_seed() -> None:
    members = list(range(0, 200, 2))
    found = neighbours(members, 8, b"seed")
    assert {len(set(peers)) for peers in found.values()} == {8}
    assert all(own in found[peer] and own != peer for own, peers in found.items() for peer in peers)
    assert neighbours(members, 8, b"other") != found
    assert neighbours(members, 8, b"seed") == found
    # a client's 8 neighbours are uniform over the 99 others: over 400 seeds each is met 400 * 8 / 99 = 32 times
    met = Counter(peer for i in range(400) for peer in neighbours(members, 8, str(i).encode())[0])
    assert len(met) == 99
    assert sum((count - 3200 / 99) ** 2 / (3200 / 99) for count in met.values()) < 98 + 5 * np.sqrt(2 * 98)


def test_few_members_are_all_joined() -> None:
    assert neighbours([1, 4, 6], 8, b"") == {1: [4, 6], 4: [1, 6], 6: [1, 4]}


def test_the_smallest_ring_without_overflow_is_chosen() -> None:
    assert choose_ring(100) == 16  # (2^15 - 1) // 100 = 327 levels
    assert choose_ring(1000) == 20  # 32 levels in 2^16, 524 in 2^20
    assert choose_ring(1000, weight_cap=64) == 32
    with pytest.raises(VectorError, match="leave 0 levels"):
        choose_ring(1000, weight_cap=2**30)


@pytest.mark.parametrize("bits", [16, 20, 32])
@pytest.mark.parametrize("clients", [2, 3, 100, 1000])
def test_the_bound_is_the_largest_that_cannot_wrap(bits: int, clients: int) -> None:
    bound = largest_bound(bits, clients)
    for value in (bound, -bound):
        total = np.array([clients * value % 2**bits]).astype(dtype_of(bits))
        assert signed(total, bits)[0] == clients * value
    assert clients * (bound + 1) > 2 ** (bits - 1) - 1


@pytest.mark.parametrize("bits", [16, 20, 32])
@pytest.mark.parametrize("length", [1, 2, 7, 200_001])
def test_a_vector_travels_in_its_bits(bits: int, length: int) -> None:
    vector = np.random.default_rng(1).integers(0, 2**bits, length).astype(dtype_of(bits))
    wire = to_wire(vector, bits)
    assert len(wire) == wire_bytes(length, bits) == (length + length % 2) // 2 * 5 if bits == 20 else length * bits // 8
    assert np.array_equal(from_wire(wire, length, bits), vector)


def test_twenty_bits_by_hand() -> None:
    """0x12345 and 0xABCDE in five bytes, little-endian: 0xABCDE12345."""
    vector = np.array([0x12345, 0xABCDE], "<u4")
    assert bytes(to_wire(vector, 20)).hex() == "4523e1cdab"


@pytest.mark.parametrize(
    ("vector", "sentence"),
    [
        (np.zeros(3, "<u2"), "a contiguous uint32"),
        (np.zeros((1, 4), "<u4"), "of 2 dimensions"),
        (np.zeros(8, "<u4")[::2], "contiguous"),
        (np.full(4, np.nan), "float64"),
        (np.zeros(3, "<u4"), "has 3 entries; this round's have 4"),
        (np.array([0, 0, 11, 0], "<u4"), "magnitude 11; beyond 10"),
        (np.array([0, 0, 0, 2**32 - 11], "<u4"), "magnitude 11; beyond 10"),
        (np.array([0, 0, 0, 2**31], "<u4"), "magnitude 2147483648; beyond 10"),
    ],
)
def test_a_wrong_vector_is_refused(vector: np.ndarray, sentence: str) -> None:
    with pytest.raises(VectorError, match=sentence):
        check_vector(vector, 4, 32, 10)
    check_vector(np.array([10, 2**32 - 10, 0, 1], "<u4"), 4, 32, 10)
