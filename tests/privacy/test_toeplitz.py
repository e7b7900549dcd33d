"""Correlated noise: the published table, dense matrices, and all patterns of participation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from fedllm.errors import PrivacyError
from fedllm.privacy.toeplitz import (
    Floats,
    banded_inverse_square_root,
    banded_square_root,
    default_band,
    inverse,
    prefix_errors,
    sensitivity,
    square_root,
)

# Rounds, participations, separation | independent noise | the whole root | BSR with band b | p and BISR with band p, if
# it was computed | gains over independent noise. Each is sensitivity / largest error / root mean square error of the
# prefixes, both errors times the sensitivity.
TABLE = """
16 1 16 | 1.00/4.0/2.9 | 1.39/1.9/1.8 | 1.39/1.9/1.8 | 6 1.33/2.0/1.8 | 2.1/1.7
16 2 8 | 1.41/5.7/4.1 | 2.18/3.0/2.8 | 1.85/3.0/2.5 | 3 1.77/3.2/2.6 | 1.9/1.6
16 4 4 | 2.00/8.0/5.8 | 3.72/5.2/4.8 | 2.44/4.9/3.9 | 2 2.42/5.3/4.1 | 1.6/1.5
16 16 1 | 4.00/16.0/11.7 | 12.97/18.1/16.7 | 4.00/16.0/11.7 | | 1.0/1.0
64 1 64 | 1.00/8.0/5.7 | 1.55/2.4/2.2 | 1.55/2.4/2.2 | 16 1.45/2.5/2.2 | 3.3/2.6
64 2 32 | 1.41/11.3/8.1 | 2.38/3.7/3.4 | 2.08/3.6/3.1 | 12 2.06/3.8/3.2 | 3.1/2.6
64 4 16 | 2.00/16.0/11.4 | 3.96/6.1/5.7 | 2.79/5.9/4.7 | 8 2.96/6.1/4.9 | 2.7/2.4
64 4 1 | 2.00/16.0/11.4 | 5.38/8.3/7.8 | 2.00/16.0/11.4 | | 1.9/1.5
64 16 4 | 4.00/32.0/22.8 | 13.35/20.6/19.3 | 4.88/18.3/13.4 | 3 5.90/18.6/13.9 | 1.7/1.7
64 64 1 | 8.00/64.0/45.6 | 51.27/79.2/74.0 | 8.00/64.0/45.6 | | 1.0/1.0
256 1 256 | 1.00/16.0/11.3 | 1.68/2.8/2.7 | 1.68/2.8/2.7 | 64 1.60/2.9/2.6 | 5.7/4.3
256 2 128 | 1.41/22.6/16.0 | 2.56/4.3/4.1 | 2.28/4.3/3.8 | 48 2.28/4.4/3.8 | 5.3/4.3
256 4 64 | 2.00/32.0/22.7 | 4.18/7.0/6.6 | 3.09/6.8/5.6 | 32 3.29/6.9/5.8 | 4.7/4.1
256 64 4 | 8.00/128/90.7 | 51.7/87.0/82.0 | 9.76/71.9/51.3 | 6 17.0/69.5/51.0 | 1.8/1.8
256 256 1 | 16.0/256/181 | 204/344/324 | 16.0/256/181 | | 1.0/1.0
"""
ROWS = [[cell.strip() for cell in line.split("|")] for line in TABLE.strip().splitlines()]


def score(c: Floats, participations: int, separation: int) -> tuple[float, float, float]:
    errors, factor = prefix_errors(c), sensitivity(c, participations, separation)
    return factor, factor * errors[-1], factor * math.sqrt(np.mean(errors**2))


def same_digits(found: tuple[float, ...], printed: str) -> None:
    texts = printed.split("/")
    assert [f"{value:.{len(text.partition('.')[2])}f}" for value, text in zip(found, texts, strict=True)] == texts


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_table(row: list[str]) -> None:
    rounds, participations, separation = map(int, row[0].split())
    found = []
    for band, cell in zip([1, rounds, default_band(rounds, separation)], row[1:4], strict=True):
        found.append(score(banded_square_root(rounds, band), participations, separation))
        same_digits(found[-1], cell)
    if row[4]:
        band_text, cell = row[4].split()
        found.append(score(banded_inverse_square_root(rounds, int(band_text)), participations, separation))
        same_digits(found[-1], cell)
    independent, others = found[0], [*found[1:], found[0]]
    gains = [independent[place] / min(other[place] for other in others) for place in (1, 2)]
    assert [float(text) for text in row[5].split("/")] == pytest.approx(gains, abs=0.06)


def test_a_wider_band_of_the_longest_row() -> None:
    same_digits(score(banded_square_root(256, 8), 64, 4), "13.4/69.4/50.1")


def dense(c: Floats) -> Floats:
    return np.array([[c[i - j] if i >= j else 0.0 for j in range(len(c))] for i in range(len(c))])


def test_first_coefficients() -> None:
    assert list(square_root(4)) == [1, 0.5, 0.375, 0.3125]
    assert list(inverse(square_root(4))) == pytest.approx([1, -0.5, -0.125, -0.0625])


def test_the_root_squared_is_the_matrix_of_ones() -> None:
    root = dense(square_root(12))
    np.testing.assert_allclose(root @ root, np.tril(np.ones((12, 12))), atol=1e-14)


@pytest.mark.parametrize("c", [square_root(12), banded_square_root(12, 5), banded_inverse_square_root(12, 3)])
def test_inverse_and_errors_are_those_of_dense_matrices(c: Floats) -> None:
    np.testing.assert_allclose(dense(inverse(c)) @ dense(c), np.eye(12), atol=1e-13)
    rows = np.tril(np.ones((12, 12))) @ np.linalg.inv(dense(c))
    np.testing.assert_allclose(prefix_errors(c), np.linalg.norm(rows, axis=1), rtol=1e-12)


def test_what_is_cut_is_zero() -> None:
    assert np.count_nonzero(banded_square_root(12, 5)) == 5
    assert np.count_nonzero(np.abs(inverse(banded_inverse_square_root(12, 5))) > 1e-12) == 5
    np.testing.assert_allclose(banded_inverse_square_root(12, 12), square_root(12), atol=1e-14)


def patterns(rounds: int, most: int, separation: int) -> list[tuple[int, ...]]:
    """All rounds that one client may be in."""
    return [
        chosen
        for size in range(1, min(most, -(-rounds // separation)) + 1)
        for chosen in itertools.combinations(range(rounds), size)
        if all(b - a >= separation for a, b in itertools.pairwise(chosen))
    ]


def moved(c: Floats, chosen: tuple[int, ...]) -> float:
    """The most that a client of these rounds moves C X: all inner products of columns count by their size."""
    columns = dense(c)[:, chosen]
    return math.sqrt(np.abs(columns.T @ columns).sum())


@pytest.mark.parametrize("separation", [1, 2, 3, 5, 12])
@pytest.mark.parametrize("rounds", [1, 7, 12])
def test_sensitivity_is_the_worst_of_all_patterns(rounds: int, separation: int) -> None:
    bands = sorted({1, min(3, rounds), rounds})
    for c in (
        *(banded_square_root(rounds, band) for band in bands),
        *(banded_inverse_square_root(rounds, band) for band in bands),
    ):
        for most in (1, 2, 3, 12):
            worst = max(moved(c, chosen) for chosen in patterns(rounds, most, separation))
            assert sensitivity(c, most, separation) == pytest.approx(worst, rel=1e-12)


def test_other_coefficients_have_an_upper_bound() -> None:
    for c in (np.array([1.0, -0.2, 0.7, 0.0, 0.4, -0.1]), np.array([1.0, 0, 0, 1, 0, 0])):
        for separation, most in itertools.product((1, 2, 3), (1, 2, 6)):
            worst = max(moved(c, chosen) for chosen in patterns(6, most, separation))
            assert sensitivity(c, most, separation) >= worst - 1e-12


def test_the_formula_for_falling_coefficients_is_no_bound_for_others() -> None:
    c = np.array([1.0, 0, 0, 1, 0, 0])  # rounds 0 and 2 move four values by 1, rounds 0 and 3 one of them by 2
    assert moved(c, (0, 2)) == 2 < moved(c, (0, 3)) == math.sqrt(1 + 4)


def test_band_by_default() -> None:
    assert [default_band(64, 1), default_band(64, 16), default_band(8, 16)] == [1, 16, 8]


@pytest.mark.parametrize("band", [0, 9, -1])
def test_bands_that_are_none_are_refused(band: int) -> None:
    for make in (banded_square_root, banded_inverse_square_root):
        with pytest.raises(PrivacyError, match="it must be 1 to 8"):
            make(8, band)
    with pytest.raises(PrivacyError, match="spans 0 rounds"):
        square_root(0)
    with pytest.raises(PrivacyError, match="both must be 1 or more"):
        sensitivity(square_root(4), 0, 1)
