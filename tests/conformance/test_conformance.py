"""Every stage of the catalog under every check of the suite, on every engine; every check under stages that are broken.

Checks of a client alone have no engine. Those of whole runs are made on each: with stacks of one client they must hold
to the bit, as on the serial engine.
"""

from __future__ import annotations

import pytest
import torch

from fedllm import tree
from fedllm.catalog import STAGES, name_of
from tests.conformance.bench import come_to, flat
from tests.conformance.suite import CHECKS, WHOLE_RUNS, distance, memories
from tests.conformance.table import CASES
from tests.conformance.twins import TWINS


def test_every_stage_is_on_the_list():
    assert CASES.keys() == STAGES.keys()
    assert all(name_of(case.stage) == name for name, case in CASES.items())


def test_a_stage_has_neutral_settings_or_says_why_not():
    for name, case in CASES.items():
        if case.neutral is None and case.keeps_space:
            assert "No setting" in (type(case.stage).__doc__ or ""), f"{name} does not say why it is never neutral"
        assert case.book is not None or case.rounding is not None, f"{name} has no result to be held against"


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("stage", CASES)
def test_stage(stage, check, bench):
    CHECKS[check](CASES[stage], bench.of(CASES[stage].stage))


@pytest.mark.parametrize("check", WHOLE_RUNS)
@pytest.mark.parametrize("stage", CASES)
def test_stage_on_other_engines(stage, check, other):
    CHECKS[check](CASES[stage], other.of(CASES[stage].stage))


@pytest.mark.parametrize("stage", CASES)
def test_engines_go_the_same_way_to_the_bit(stage, other, bench):
    reference, course = (place.of(CASES[stage].stage).run(CASES[stage].trip()) for place in (bench, other))
    for one, two in zip(reference.after, course.after, strict=True):
        assert torch.equal(come_to(one), come_to(two)) and all(map(tree.equal, one.states, two.states))
    assert memories(reference) == memories(course)


@pytest.mark.parametrize("stage", CASES)
def test_stacks_differ_from_one_client_at_a_time_in_the_last_digits(stage, stacked, bench):
    reference, course = (place.of(CASES[stage].stage).run(CASES[stage].trip()) for place in (bench, stacked))
    for one, two in zip(reference.after, course.after, strict=True):
        start = flat(reference.after[0].params)
        start = torch.cat([start, start.new_zeros(len(come_to(one)) - len(start))])
        assert distance(come_to(two) - start, come_to(one) - start) < 1e-9 or one.round == 0


@pytest.mark.parametrize("twin", TWINS, ids=lambda twin: type(twin.stage).__name__)
def test_a_broken_stage_is_caught(twin, bench):
    with pytest.raises(twin.error):
        CHECKS[twin.caught_by](twin.case(CASES[twin.of]), bench.of(twin.stage))


def test_every_stage_has_a_broken_twin_and_every_check_catches_one():
    assert {twin.of for twin in TWINS} == STAGES.keys()
    assert {twin.caught_by for twin in TWINS} == CHECKS.keys()
