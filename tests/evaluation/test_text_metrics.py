"""Scores of one answer, by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.evaluation.text_metrics import choice_score, exact_match, rouge_l


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("Teal", "teal", 1.0),
        (" teal.\n", "teal", 1.0),
        ("dark  teal", "Dark teal.", 1.0),
        ("teal blue", "teal", 0.0),
        ("", "teal", 0.0),
        ("the teal", "teal", 0.0),  # articles count: an answer is short
    ],
)
def test_exact_match(answer: str, reference: str, score: float) -> None:
    assert exact_match(answer, reference) == score


def test_rouge_l_by_hand() -> None:
    # longest common subsequence "the cat mat": 3 of 4 and of 6 words: F1 = 2 * 3 / (4 + 6)
    assert rouge_l("the cat sat mat", "the big cat on a mat") == pytest.approx(0.6)
    assert rouge_l("mat cat the", "the cat mat") == pytest.approx(2 * 1 / 6)  # order counts
    assert rouge_l("", "the cat") == 0.0


words = st.lists(st.sampled_from(["a", "b", "c"]), max_size=7)


@given(words, words)
def test_rouge_l_is_symmetric_and_exact_only_for_equals(left: list[str], right: list[str]) -> None:
    score = rouge_l(" ".join(left), " ".join(right))
    assert score == pytest.approx(rouge_l(" ".join(right), " ".join(left)))
    assert 0.0 <= score <= 1.0
    assert (score == 1.0) == (left == right and bool(left))


def test_ties_share_the_point_wherever_the_right_option_stands() -> None:
    for answer in range(4):
        assert choice_score([-1.0, -1.0 + 5e-7, -1.0, -1.0], answer) == 0.25
    assert choice_score([-1.0, -0.5, -2.0], 1) == 1.0
    assert choice_score([-1.0, -0.5, -2.0], 0) == 0.0
    assert choice_score([-1.0, -0.5, -0.5], 2) == 0.5
    assert choice_score([-1.0, -1.0 + 2e-6], 0) == 0.0  # further apart than the tolerance
