"""The sum is exact, whoever drops out, and the server sees nothing else."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from fedllm.privacy.secure_aggregation import client, server
from fedllm.privacy.secure_aggregation.faults import TooFewError
from fedllm.privacy.secure_aggregation.primitives import AES, CHACHA
from fedllm.privacy.secure_aggregation.rings import from_wire, wire_bytes
from tests.privacy.secure_aggregation.network import STAGES, Cohort, cohort, encode, play, until


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_sum_is_exact_whoever_drops_out(data: st.DataObject) -> None:
    clients = data.draw(st.integers(2, 9), "clients")
    drops = data.draw(st.dictionaries(st.sampled_from(range(clients)), st.sampled_from(STAGES), max_size=4), "drops")
    bits = data.draw(st.sampled_from((16, 20, 32)), "bits")
    cipher = data.draw(st.sampled_from((AES, CHACHA)), "cipher")
    group = cohort(clients, data.draw(st.integers(1, 40)), bits, data.draw(st.integers(0, 99)), cipher=cipher)
    silent = {f"client{i}": stage for i, stage in drops.items()}
    # each stage needs the threshold + 1; a survivor's secret needs the threshold of its neighbours to the end
    enough = clients - len(silent) >= max(2, group.manifest.threshold + 1)
    if not enough:
        with pytest.raises(TooFewError):
            play(group, silent)
        return
    found = play(group, silent)
    late = {name for name, stage in silent.items() if stage in ("agree", "unmask")}
    assert set(found.survivors) == set(group.identities) - set(silent) | late
    assert found.values.tolist() == group.expected(found.survivors)
    assert found.blamed == {} and group.refused == {}


@pytest.mark.parametrize("stage", STAGES)
def test_a_graph_of_few_neighbours_is_exact(stage: str) -> None:
    group = cohort(16, 11, 16, degree=8, threshold=5)
    found = play(group, {"client3": stage, "client9": stage})
    assert found.values.tolist() == group.expected(found.survivors)
    assert len(found.survivors) == (16 if stage in ("agree", "unmask") else 14)


def test_extremes_do_not_wrap() -> None:
    for value in (1, -1):
        group = cohort(5, 3, 16)
        group.vectors = {name: np.full(3, value * group.manifest.bound) for name in group.vectors}
        assert play(group).values.tolist() == [5 * value * group.manifest.bound] * 3


def test_below_the_threshold_the_round_ends_and_says_where() -> None:
    with pytest.raises(TooFewError, match="2 of 6 clients of round 7 of 'run/train' were left after MASKED"):
        play(cohort(6), {f"client{i}": "mask" for i in range(4)})


def test_min_survivors_holds_above_the_threshold() -> None:
    with pytest.raises(TooFewError, match="a sum needs 6"):
        play(cohort(6, min_survivors=6), {"client0": "mask"})


def masked(group: Cohort, name: str, bits: int) -> np.ndarray:
    """A client's masked vector, as the server reads it, in a new round."""
    _, to_clients = until(group, "mask")
    data = client.mask(group.states[name], to_clients[name], encode(group, name))
    size = wire_bytes(group.manifest.length, bits)
    front = 4 + 1 + 32 + 2
    return from_wire(memoryview(data)[front : front + size], group.manifest.length, bits)


@pytest.mark.parametrize("bits", [16, 20, 32])
def test_masked_vectors_are_uniform_over_the_ring(bits: int) -> None:
    """Chi-square over 256 classes, of the top and of the bottom eight bits; the vector itself is all zeros.

    The bound is passed with chance 1e-6 by a uniform vector."""
    length = 200_000
    group = cohort(3, length, bits)
    group.vectors = {name: np.zeros(length, int) for name in group.vectors}
    found = masked(group, "client0", bits).astype(np.int64)
    for part in (found >> (bits - 8), found & 255):
        counts = np.bincount(part, minlength=256)
        statistic = ((counts - length / 256) ** 2 / (length / 256)).sum()
        assert chi2.ppf(1e-6, 255) < statistic < chi2.ppf(1 - 1e-6, 255)


@pytest.mark.parametrize(("bits", "shared"), [(16, True), (20, False), (32, True)])
def test_a_message_in_pieces_holds_the_vector_itself(bits: int, shared: bool) -> None:
    group = cohort(3, 1001, bits)
    state, to_clients = until(group, "mask")
    vector = encode(group, "client0")
    pieces = client.mask_in_pieces(group.states["client0"], to_clients["client0"], vector)
    assert np.shares_memory(np.frombuffer(pieces[1], np.uint8), vector) == shared
    server.add_masked(state, b"".join(pieces))


def test_two_rounds_never_have_the_same_mask() -> None:
    """Equal vectors in two rounds: entries of 32 bits agree by chance only, 1000 / 2^32 times."""
    group = cohort(3, 1000)
    first = masked(group, "client0", 32)
    again = cohort(3, 1000, round=8)
    again.vectors, again.identities = group.vectors, again.identities
    second = masked(again, "client0", 32)
    assert Counter(first == second)[True] < 5


def test_the_total_is_the_only_vector_that_the_server_keeps() -> None:
    group = cohort(4, 1000)
    state, _ = until(group, "agree")
    held = [value for value in vars(state).values() if isinstance(value, np.ndarray)]
    assert sum(value.nbytes for value in held) == 4 * (1000 + 4)
    assert not any(isinstance(value, bytes) and len(value) > 1000 for value in vars(state).values())
