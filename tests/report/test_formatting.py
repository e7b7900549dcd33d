"""Quantities as text, each against a value worked out by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.evaluation.scores import METRICS
from fedllm.report.formatting import (
    duration,
    figure,
    finite,
    labelled,
    lower_is_better,
    part_of_whole,
    printable,
    remaining,
    share,
    size,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "—"),
        (math.nan, "—"),
        (-math.inf, "—"),
        (0, "0"),
        (0.0, "0"),
        (4, "4"),
        (921_600, "921,600"),
        (2.72, "2.720"),
        (0.3, "0.3000"),
        (0.0384, "0.0384"),
        (15.25, "15.25"),
        (1965.2, "1,965"),
        (-1.5, "-1.500"),
        (0.000123456, "0.000123"),
    ],
)
def test_figure(value: float | None, text: str) -> None:
    assert figure(value) == text


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_figure_never_shows_nan_and_is_close(value: float) -> None:
    text = figure(value)
    if not finite(value):
        assert text == "—"
    else:
        assert float(text.replace(",", "")) == pytest.approx(value, rel=6e-3, abs=5e-5)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "—"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (7.1 * 2**20, "7.1 MiB"),
        (1000 * 2**20, "1000 MiB"),
        (2**50, "1024 TiB"),
    ],
)
def test_size(value: float | None, text: str) -> None:
    assert size(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "—"),
        (0.0452, "45 ms"),
        (12.34, "12.3 s"),
        (59.97, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3725, "1 h 02 min"),
        (90_000, "25 h 00 min"),
    ],
)
def test_duration(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_remaining_and_share() -> None:
    assert [remaining(0.2), remaining(7.6), remaining(59.7)] == ["0 s", "8 s", "1 min 00 s"]
    assert [share(1, 8), share(0, 0)] == ["12.5 %", "—"]
    assert [part_of_whole(0.5), part_of_whole(None), part_of_whole(math.nan)] == ["50.0 %", "—", "—"]


def test_a_metric_says_what_it_is_a_mean_over() -> None:
    assert [labelled(name) for name in ("nll", "perplexity/x", "own/nll")] == [
        "nll, per token",
        "perplexity/x, per token",
        "own/nll, per token",
    ]
    assert {labelled(name) for name in METRICS} == {
        "nll, per token",
        *(f"{name}, per record" for name in ("exact_match", "rouge_l", "accuracy")),
    }
    assert labelled("elsewhere") == "elsewhere"


def test_direction_of_metrics() -> None:
    lower = [
        name
        for name in ("nll", "loss/private", "perplexity", "error_rate", "bits_per_byte", "own/nll/x")
        if lower_is_better(name)
    ]
    assert len(lower) == 6
    assert not any(
        lower_is_better(name)
        for name in ("exact_match", "accuracy", "rouge_l", "own/accuracy", "exact_match/loss", "glossary")
    )


def test_printable_keeps_words_and_drops_control() -> None:
    assert printable("a\x1b[2Jb\nc\tü ") == "a [2Jb c ü"
