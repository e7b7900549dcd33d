"""The chapter on privacy: its odds, its words for each kind of promise, and its pictures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from fedllm.events import Event, PrivacyPromised, PrivacySpent, Resumed
from fedllm.report import privacy
from fedllm.report.promise import surest
from fedllm.report.run_history import RunHistory, effective
from fedllm.report.sections import sections

MakeEvents = Callable[..., list[Event]]
PROMISE = PrivacyPromised(
    unit="client",
    mechanism="gaussian_dp",
    noised_by="server",
    epsilon=7.97,
    delta=1e-5,
    target_epsilon=8.0,
    noise_multiplier=1.25,
    clip=0.1,
    relation="add-remove",
    accountant="pld",
    sampling={"scheme": "poisson", "rate": 0.25},
    simulated=True,
    seeded_noise=False,
    in_the_clear=False,
    adaptive=False,
    assumptions=("the server adds the noise and keeps it secret",),
)


def private(events: list[Event], **changes: Any) -> list[Event]:
    """The same run with a promise and what four rounds spent."""
    promise = replace(PROMISE, **changes)
    spent = [
        PrivacySpent(round, promise.mechanism, promise.unit, 2.0 * (round + 1), 1e-5, 1.25, 0.1 / (round + 1), 0.5)
        for round in range(4)
    ]
    return [events[0], promise, *events[1:], *spent]


def story(events: list[Event], label: str = "run") -> RunHistory:
    return RunHistory(label, tuple(events), {}, "")


def page(*stories: RunHistory) -> str:
    return dict(sections(stories))["Privacy"]


@pytest.mark.parametrize(
    ("prior", "epsilon", "sure"),
    [(0.5, 0.0, 0.5), (0.5, math.log(3), 0.75), (0.25, math.log(9), 0.75), (0.01, math.log(99), 0.5)],
)
def test_odds_grow_by_the_power_of_epsilon(prior: float, epsilon: float, sure: float) -> None:
    """By hand: odds of 1 to 3 times 9 are 3 to 1."""
    assert surest(prior, epsilon) == pytest.approx(sure, rel=1e-12)


def test_a_run_without_a_promise_has_no_such_chapter(events: MakeEvents) -> None:
    assert page(story(events(rounds=2))) == ""


def test_the_words_say_who_what_whom_and_how_much(events: MakeEvents) -> None:
    text = page(story(private(events(rounds=4))))
    for words in (
        "All that any one client holds",
        "Not from the server itself",
        "1.250 times the clip",
        "epsilon of 8 at a delta of 1e-05",
        "at most 99.966 % sure",  # 1 / (1 + e^-8)
        "by a factor of at most 2,981",  # e^8
        "1 chance in 100,000",
        "the same run without the client",
        "The server adds the noise and keeps it secret.",
        "No loss, count or score left a client",
        "in real use the draw must be secret",
        "each client by a coin of 25 %",
    ):
        assert words in text, words


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"unit": "example"}, ("Each single record of each client", "two records count as twice the epsilon")),
        ({"noised_by": "client"}, ("everybody, the server too", "before anything left it")),
        ({"relation": "replace-one"}, ("other data in the place of the client",)),
        ({"seeded_noise": True}, ("This was a test, and nothing is promised", "can subtract it")),
        ({"in_the_clear": True}, ("the promise does not cover them", "evaluation.private: false")),
        ({"noise_multiplier": 0.0, "epsilon": None}, ("No noise was added", "nobody: there is no noise")),
        ({"mechanism": "dp_ftrl", "sampling": {"scheme": "rotation", "min_separation": 5}}, ("in turn, 5 rounds apart",
          "times what one client can change in the whole run")),
        ({"sampling": {"scheme": "fixed_size", "population": 60, "cohort": 12}}, ("12 of 60 clients, by lot",)),
        ({"sampling": {"scheme": "every_round"}}, ("no chance is counted on",)),
    ],
)  # fmt: skip
def test_each_kind_of_promise_has_its_words(
    events: MakeEvents, changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    made, plain = events(rounds=4), story(private(events(rounds=4)))
    text = page(story(private(made, **changes)))
    for expected in words:
        assert expected in text
        assert expected not in page(plain)


def test_a_promise_without_noise_makes_no_claim(events: MakeEvents) -> None:
    text = page(story(private(events(rounds=4), noise_multiplier=0.0, epsilon=None)))
    assert "What is protected" not in text and "at most" not in text.partition("<div")[0]


def test_epsilon_by_round_stands_below_its_budget(events: MakeEvents) -> None:
    drawn, facts, _ = privacy.chapter([story(private(events(rounds=4)))])
    assert [figure.title for figure in drawn] == ["Epsilon, by round", "Signal to noise"]
    curve, budget = drawn[0].traces
    assert curve["x"] == [1, 2, 3, 4] and curve["y"] == [2.0, 4.0, 6.0, 8.0]
    assert budget["y"] == [8.0, 8.0] and "8 in 4 rounds" in facts


def test_a_clip_that_moves_has_a_picture(events: MakeEvents) -> None:
    drawn, _, _ = privacy.chapter([story(private(events(rounds=4), adaptive=True))])
    assert [trace["y"] for trace in drawn[2].traces] == [[0.1, 0.05, 0.1 / 3, 0.025]]


def test_several_runs_have_a_line_and_a_column_each(events: MakeEvents) -> None:
    made = events(rounds=4)
    plain, one, two = story(made, "plain"), story(private(made), "one"), story(private(made), "two")
    drawn, facts, words = privacy.chapter([plain, one, two])
    assert [trace["name"] for trace in drawn[0].traces] == ["one", "two"]
    assert "one" in facts and "two" in facts and "plain" not in facts
    assert len(words) == 2 and all(text.startswith("<details>") for text in words)


def test_rounds_that_were_lost_are_not_counted_twice(events: MakeEvents) -> None:
    """A resumed run tells again what a lost round spent."""
    made = private(events(rounds=4))
    again = [Resumed(3), PrivacySpent(3, "gaussian_dp", "client", 8.5, 1e-5, 1.25, 0.1)]
    drawn, _, _ = privacy.chapter([story(effective([*made, *again]))])
    assert drawn[0].traces[0]["y"] == [2.0, 4.0, 6.0, 8.5]
