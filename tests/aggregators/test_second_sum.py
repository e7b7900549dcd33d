"""A round that is asked for again has the sum that it had, or none: two that differ would show their difference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedllm.aggregators.keyring import Keyring
from fedllm.aggregators.secure_sum import SecureSum
from fedllm.errors import RoundVoid
from fedllm.messages.update import Part, Update
from fedllm.privacy.secure_aggregation.faults import SurvivorsError
from fedllm.privacy.secure_aggregation.spent import SpentInMemory, SpentOnDisk
from fedllm.stages.privacy.fixed_point import FixedPoint
from tests.aggregators.conversation import Conversation, context, encoded

NAMES = ("ann", "ben", "cid", "dan", "eve")
AGGREGATOR = SecureSum(corrupt=0.0, dropout=0.2)


def talk(keyring: Keyring, **lost: Any) -> Conversation:
    sent = {
        name: Update({"delta": Part({"w": torch.full((2, 3), place + 0.5)}, 1.0)}) for place, name in enumerate(NAMES)
    }
    return Refusing(AGGREGATOR, encoded(FixedPoint(bound=8.0), sent), keyring=keyring, **lost)


class Refusing(Conversation):
    """What a client refuses is its failure, as on an engine."""

    def __call__(self, name: str, requests: Any) -> Any:
        for client, request in requests.items():
            try:
                yield from super().__call__(name, {client: request})
            except SurvivorsError as error:
                self.refusals.append((name, client, str(error)))


def total(conversation: Conversation, scale: float = 1.0) -> torch.Tensor:
    found = AGGREGATOR.reduce(conversation, conversation.requests({"w": torch.tensor(scale)}))
    return FixedPoint(bound=8.0).decode(found, {}, {}, context("", 0, len(NAMES)))[0].parts["delta"].tree["w"]


@pytest.mark.parametrize("on_disk", [True, False])
def test_the_same_sum_is_had_again_and_another_one_is_not(tmp_path: Path, on_disk: bool) -> None:
    keyring = Keyring(tmp_path / "identities") if on_disk else Keyring()
    first = total(talk(keyring))
    assert torch.equal(first, total(talk(Keyring(tmp_path / "identities") if on_disk else keyring)))
    again = talk(keyring, lost={("mask", "eve")})  # first - second would be what eve has sent
    with pytest.raises(RoundVoid):
        total(again)
    assert {client for name, client, _ in again.refusals if name == "agree"} == set(NAMES) - {"eve"}
    assert "round 1: this client has agreed to a sum over other clients" in again.refusals[0][2]
    other = talk(keyring)
    with pytest.raises(RoundVoid):
        total(other, scale=2.0)  # another model


def test_without_the_marker_the_difference_of_two_sums_is_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control."""
    monkeypatch.setattr(SpentInMemory, "agree", lambda *about: None)
    keyring = Keyring()
    difference = total(talk(keyring)) - total(talk(keyring, lost={("mask", "eve")}))
    assert torch.allclose(difference, torch.full((2, 3), 4.5), atol=1e-6)


def test_a_round_that_ended_before_anybody_agreed_may_have_another_sum() -> None:
    keyring = Keyring()
    broken = talk(keyring, lost={("agree", name) for name in NAMES})
    with pytest.raises(RoundVoid):
        total(broken)
    assert float(total(talk(keyring, lost={("mask", "eve")}))[0, 0]) == pytest.approx(0.5 + 1.5 + 2.5 + 3.5, abs=1e-6)


def test_old_rounds_are_forgotten(tmp_path: Path) -> None:
    spent = SpentOnDisk(tmp_path)
    for step in range(70):
        spent.agree("task", step, bytes([step]))
    assert len(list(tmp_path.glob("*/agreed-*"))) == 65
    with pytest.raises(SurvivorsError, match="round 70"):
        spent.agree("task", 69, b"other")
