"""Spread, gains and shares, by hand."""

from __future__ import annotations

import pytest

from fedllm.events import Evaluated, PersonalEvaluated
from fedllm.report.fairness import better_off, client_gains, personal_summary, spread

OWN = {"a": {"nll": 9.0, "own/nll": 2.0}, "b": {"own/nll": 3.0}, "c": {"own/nll": 1.0}}
ALONE = Evaluated("local_only", 2, {}, OWN)
AFTER = Evaluated("federated", 2, {"nll": 2.0}, {"a": {"nll": 1.5}, "b": {"nll": 3.0}, "d": {"nll": 6.0}})


def test_the_spread_over_clients() -> None:
    told = spread("nll", {"a": 1.0, "b": 3.0, "c": 5.0})
    assert told == {
        "mean": 3.0, "std": pytest.approx((8 / 3) ** 0.5), "worst": 5.0, "best": 1.0, "gap": 4.0, "worst_client": "c",
    }  # fmt: skip
    assert spread("rouge_l", {"a": 0.25, "b": 0.75})["worst_client"] == "a"


def test_a_gain_is_positive_where_the_own_figure_is_better() -> None:
    gains = client_gains("nll", ALONE, AFTER)
    assert gains == {"a": 0.5, "b": 0.0}, "on the own records; of clients that have both"
    assert better_off(gains) == 0.5, "an equal figure is no gain"
    assert client_gains("f", Evaluated("x", 0, {}, {"a": {"f": 0.25}}), Evaluated("y", 0, {}, {"a": {"f": 0.5}})) == {
        "a": 0.25
    }


def test_the_summary_of_few_models() -> None:
    event = PersonalEvaluated(
        2, {"a": {"a": {"nll": 1.5}, "b": {"nll": 4.0}}, "b": {"a": {"nll": 2.0}, "b": {"nll": 3.0}}},
        others={"a": {"nll": 4.0}, "b": {"nll": 2.0}}, union={"a": {"nll": 2.5}, "b": {"nll": 2.25}}, population=3,
    )  # fmt: skip
    told = personal_summary(event, {"federated": AFTER, "local_only": ALONE})
    nll = told["metrics"]["nll"]
    assert (nll["others"], nll["all"], nll["own"]["worst"]) == (3.0, 2.375, 6.0)
    assert nll["better_than"] == {"local_only": 0.5} and told["population"] == 3
    assert told["clients"]["b"] == {"own": {"nll": 3.0}, "others": {"nll": 2.0}, "all": {"nll": 2.25}}
