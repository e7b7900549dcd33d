"""Secure sums in groups: the mean is the secure sum, the median outvotes a bad group."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch

import fedllm
from fedllm.aggregators.bucketed import Bucketed, combined
from fedllm.aggregators.secure_sum import SecureSum
from fedllm.errors import CheckError, ConfigError, RoundVoid
from fedllm.experiment.checks.check import check, check_profiles
from fedllm.messages.update import Part, Update
from fedllm.rng import Key
from fedllm.stages.privacy.fixed_point import FixedPoint
from tests.aggregators.conversation import Conversation, context, encoded
from tests.runs.small import spec

NAMES = [f"c{number:02d}" for number in range(26)]
SETTINGS: dict[str, Any] = {"corrupt": 0.0, "dropout": 0.2}


def updates(poisoned: str = "") -> dict[str, Update]:
    """Deltas of 1 .. 26 hundredths, not square; one client may send another sign and ten times as much."""
    made = {}
    for place, name in enumerate(NAMES):
        value = torch.full((3, 2), (place + 1) / 100) * torch.tensor([1.0, -0.5])
        value = -10 * value.abs().max() * torch.ones(3, 2) if name == poisoned else value
        made[name] = Update({"delta": Part({"w": value}, 1.0), "counts": Part({"tokens": torch.tensor(place)}, 0.0)})
    return made


def summed(aggregator: SecureSum | Bucketed, sent: dict[str, Update], **lost: Any) -> tuple[Update, Conversation]:
    """The decoded total."""
    stage = FixedPoint(bound=4.0)
    talk = Conversation(aggregator, encoded(stage, sent), **lost)
    total = aggregator.reduce(talk, talk.requests())
    return stage.decode(total, {}, {}, context("", 0, len(sent)))[0], talk


def test_groups_are_of_eight_clients_or_more_and_nobody_is_left_out() -> None:
    for count in (3, 8, 15, 16, 26, 100):
        groups = Bucketed().groups([str(n) for n in range(count)], Key(count).generator())
        sizes = sorted(map(len, groups))
        assert sorted(chain(*groups), key=int) == [str(n) for n in range(count)]
        assert len(groups) == max(1, count // 8) and sizes[-1] - sizes[0] <= 1
    assert Bucketed().groups(NAMES, Key(1).generator()) != Bucketed().groups(NAMES, Key(2).generator())


def test_the_mean_of_groups_is_the_secure_sum() -> None:
    lost = {("mask", "c03"), ("work", "c10")}
    whole, _ = summed(SecureSum(**SETTINGS), updates(), lost=lost)
    groups, talk = summed(Bucketed(**SETTINGS), updates(), lost=lost)
    assert torch.equal(whole.parts["delta"].tree["w"], groups.parts["delta"].tree["w"])
    assert whole.parts["delta"].weight == groups.parts["delta"].weight == 24.0
    assert int(groups.parts["counts"].tree["tokens"]) == sum(range(26)) - 3 - 10
    asked = [client for name, client in talk.heard if name == "mask"]
    assert sorted(asked) == sorted(set(NAMES) - {"c03", "c10"})


def test_a_median_outvotes_a_poisoned_group_and_a_mean_does_not() -> None:
    clean = sum((place + 1) / 100 for place in range(26))
    found = {
        rule: float(summed(Bucketed(rule=rule, **SETTINGS), updates("c07"))[0].parts["delta"].tree["w"][0, 0])
        for rule in ("mean", "median")
    }
    # c07 sends -0.8 in place of 0.08: a tenth of the range of honest means is 0.02
    assert found["mean"] == pytest.approx(clean - 0.88, abs=1e-5)
    honest = sorted(means_of_groups())
    assert 26 * honest[0] - 1e-5 <= found["median"] <= 26 * honest[-1] + 1e-5


def means_of_groups() -> list[float]:
    groups = Bucketed().groups(NAMES, context("", 0, 26).key.fold(0, "groups").generator())
    return [sum((NAMES.index(name) + 1) / 100 for name in group) / len(group) for group in groups]


def test_the_median_is_that_of_the_means_entry_by_entry() -> None:
    """Groups of 1, 2 and 1 clients with means (1, 9), (2, 2) and (30, 3): medians (2, 3), times 4 clients."""
    groups = [
        (Update({"values": Part({"x": torch.tensor(s, dtype=torch.int32)}, 0.0), "digits": Part({"n": torch.tensor(
            [n], dtype=torch.int32)}, 0.0)}), n)
        for s, n in (([1, 9], 1), ([4, 4], 2), ([30, 3], 1))
    ]  # fmt: skip
    total = combined(groups, "median")
    assert total.parts["values"].tree["x"].tolist() == [8, 12] and total.parts["digits"].tree["n"].tolist() == [4]
    assert total.parts["values"].tree["x"].dtype == torch.int32
    assert combined(groups, "mean").parts["values"].tree["x"].tolist() == [35, 16]


def test_a_group_below_its_threshold_is_left_out_and_told() -> None:
    groups = Bucketed().groups(NAMES, context("", 0, 26).key.fold(0, "groups").generator())
    lost = {("mask", name) for name in groups[0][:6]}
    total, talk = summed(Bucketed(**SETTINGS), updates(), lost=lost)
    assert total.parts["delta"].weight == sum(len(group) for group in groups[1:])
    told = {client for name, client, reason in talk.refusals if "its group of" in reason and name == "mask"}
    assert told == set(groups[0])
    with pytest.raises(RoundVoid, match="the secure sum was given up"):
        summed(Bucketed(**SETTINGS), updates(), lost={("mask", name) for name in NAMES})


def test_what_a_group_cannot_be_is_refused(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match=r"bucketed\.group is 4; it must be 8 or more"):
        Bucketed(group=4)
    with pytest.raises(ConfigError, match=r"bucketed\.rule is 'krum'"):
        Bucketed(rule="krum")  # type: ignore[arg-type]
    path = tmp_path / "none.jsonl"
    median = {"bucketed": {"rule": "median"}}
    private = [
        {"uniform": {"denominator": "cohort"}},
        {"gaussian_dp": {"clip": 1.0, "noise_multiplier": 1.0}},
        "fixed_point",
    ]
    silent = {"evaluation": {"metrics": []}}
    with pytest.raises(CheckError, match="gaussian_dp bounds what one client changes in a sum, and a median is none"):
        check(fedllm.build(spec(path, aggregator=median, stages=private, **silent)))
    weighed = ["by_examples", {"fixed_point": {"max_weight": 9}}]
    with pytest.raises(CheckError, match="every client weighs the same"):
        check(fedllm.build(spec(path, aggregator=median, stages=weighed)))
    small = fedllm.build(spec(path, aggregator=median, stages=["uniform", "fixed_point"]))
    check(small)
    with pytest.raises(CheckError, match="a median needs three groups; draw 24 or more, or set rule to mean"):
        check_profiles(small, {name: small.federation.profile(name) for name in NAMES[:20]})
