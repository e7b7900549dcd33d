"""Each alarm: what raises it, what does not, and that it is said once for as long as it lasts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from fedllm.errors import ConfigError
from fedllm.evaluation.diagnostics.alarms import Alarms
from fedllm.evaluation.settings import Diagnostics
from fedllm.events import Diagnosed, Event, Resumed, RoundFinished, Warned

CALM = Diagnosed(0, 3, 1.0, {"a": 1.0, "b": 1.0, "c": 1.0}, 0.5, 1.0, 0.1, 0.1, 1.0, 2.0, None, None)
TWO = Diagnostics(rounds=2, agreement=1.0, bias=0.3, bytes_per_loss=1000)


def rounds(
    losses: Sequence[float | None], *, cosines: Sequence[float | None] = (), biases: Sequence[float | None] = ()
) -> list[Event]:
    """Rounds of 100 bytes; the figures of those that have none are calm."""
    made: list[Event] = []
    for number, loss in enumerate(losses):
        cosine = cosines[number] if cosines else 0.5
        bias = biases[number] if biases else 0.1
        made.append(replace(CALM, round=number, cosine=cosine, bias=bias, bias_of_means=bias))
        made.append(RoundFinished(number, 3, loss, 60, 40, 10, 1.0))
    return made


def raised(events: Sequence[Event], settings: Diagnostics = TWO) -> dict[int, str]:
    """By round, what was said."""
    alarms, found = Alarms(settings), dict[int, str]()
    for event in events:
        alarms(event)
        if isinstance(event, RoundFinished):
            for warned in alarms.begun():
                assert warned.round == event.round and warned.text.startswith(f"round {event.round + 1}: ")
                found[event.round] = warned.text
    return found


FALLING = [3.0, 2.0, 1.0, 0.5, 0.1, 0.05]


def test_nothing_is_wrong() -> None:
    assert raised(rounds(FALLING)) == {}


def test_clients_that_diverge() -> None:
    found = raised(rounds(FALLING, cosines=[-0.1, 0.2, -0.1, -0.3, -0.2, 0.4]))
    assert list(found) == [3]  # the second round in a row, and not again in the third
    assert "the mean cosine of their updates is -0.3, their agreement 0.4, below 1 for 2 rounds" in found[3]
    assert raised(rounds(FALLING, cosines=[-0.1, 0.0, -0.1, 0.0, -0.1, 0.0])) == {}
    assert raised(rounds(FALLING, cosines=[-0.1, None, -0.1, None, -0.1, None])) == {}


def test_an_alarm_that_ceases_is_raised_again() -> None:
    assert list(raised(rounds(FALLING, cosines=[-0.1, -0.1, 0.1, -0.1, -0.1, -0.1]))) == [1, 4]


def test_a_large_aggregation_bias() -> None:
    found = raised(rounds(FALLING, biases=[0.4, 0.2, 0.4, 0.5, 0.2, 0.1]))
    assert list(found) == [3]
    assert "the aggregation loses 50% of the mean of the clients' products, above 30% for 2 rounds" in found[3]
    assert raised(rounds(FALLING, biases=[0.3] * 6)) == {}


@pytest.mark.parametrize(
    ("bias", "means", "expected"), [(0.4, 0.5, [1]), (0.4, 0.1, []), (0.0, 0.5, []), (None, 0.5, [1])]
)
def test_a_bias_is_one_that_the_mean_of_factors_has(bias: float | None, means: float, expected: list[int]) -> None:
    """A server optimiser is far from the mean without such a bias; FlexLoRA loses nothing where the mean would."""
    events = [replace(e, bias=bias, bias_of_means=means) if isinstance(e, Diagnosed) else e for e in rounds(FALLING)]
    assert list(raised(events)) == expected


def test_a_loss_that_does_not_fall() -> None:
    found = raised(rounds([3.0, 2.0, 1.0, 1.2, 1.1, 1.1]))
    assert list(found) == [5]  # (1.1 + 1.1) / 2 against (1.0 + 1.2) / 2
    assert "the training loss does not fall: 1.1 on average over the last 2 rounds, 1.1 over those before" in found[5]
    assert raised(rounds([2.0, 2.0, 2.0])) == {}  # there are not yet two rounds to compare two with
    assert raised(rounds([2.0, 2.0, None, 2.0, 2.0])) == {}  # an aggregator that hides it


def test_bytes_that_outweigh_the_gain() -> None:
    found = raised(rounds([3.0, 2.0, 1.0, 0.5, 0.9, 0.4]))
    # the last two rounds: 200 bytes for (1.0 + 0.5) / 2 - (0.9 + 0.4) / 2 = 0.1
    assert list(found) == [5]
    assert "the last 2 rounds cost 2e+03 bytes for 1 nat of training loss, above 1e+03" in found[5]
    assert raised(rounds([3.0, 2.0, 1.0, 0.5, 0.9, 0.4]), replace(TWO, bytes_per_loss=2001)) == {}


def test_lost_rounds_count_no_more() -> None:
    """A resumed run hears of the rounds before, not of those that it runs again."""
    before = rounds(FALLING[:3], cosines=[0.2, -0.1, -0.1])
    again = [event for event in rounds(FALLING[:3], cosines=[0.2, 0.2, -0.1]) if event.__dict__["round"] >= 1]
    assert list(raised([*before, Resumed(1), *again])) == [2]
    alarms = Alarms(TWO)
    for event in (*before, Resumed(1), *again):
        alarms(event)
    assert alarms.begun() == []


def test_alarms_know_their_round() -> None:
    alarms = Alarms(TWO)
    for event in rounds([3.0, 2.0], cosines=[-0.1, -0.1]):
        alarms(event)
    (warned,) = alarms.begun()
    assert isinstance(warned, Warned) and warned.round == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clients": 0}, "evaluation.diagnostics.clients is 0; it must be 1 or more"),
        ({"layers": 0}, "evaluation.diagnostics.layers is 0; it must be 1 or more, or null for all"),
        ({"rounds": 0}, "evaluation.diagnostics.rounds is 0; it must be 1 or more"),
        ({"agreement": -1.5}, "evaluation.diagnostics.agreement is -1.5"),
        ({"bias": -0.1}, "evaluation.diagnostics.bias is -0.1"),
        ({"bytes_per_loss": 0.0}, "evaluation.diagnostics.bytes_per_loss is 0.0"),
    ],
)
def test_thresholds_that_cannot_be_right(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Diagnostics(**settings)  # type: ignore[arg-type]
    assert message in str(caught.value)
