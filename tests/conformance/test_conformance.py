"""Every stage of the catalog under every check of the suite; every check under stages that are broken; every engine.

The checks are made on the serial engine. Another engine must give its bits with stacks of one client, and its digits
with stacks of two; whatever the checks say of a serial run then holds there, too. Rounds in which nobody answers and
resuming, in which an engine has a part, are checked there for one stage of each kind: `KINDS`. On Ray the stages of
presets are compared in tests/papers/test_presets_everywhere.py; here are the others, and those kinds.
"""

from __future__ import annotations

import pytest
import torch

from fedllm.experiment.catalog import STAGES, name_of
from fedllm.tensors import tree
from tests.conformance.bench import come_to, flat
from tests.conformance.suite import CHECKS, OF_ENGINES, distance, memories
from tests.conformance.table import CASES
from tests.conformance.twins import TWINS
from tests.papers.test_presets import EXPANSIONS

KINDS = ("scaffold", "lora_merge")  # what a client remembers, and the server holds; frozen weights that move
NO_PRESET = CASES.keys() - {name_of(stage) for stages in EXPANSIONS.values() for stage in stages}
ON = [
    *(("batched", stage) for stage in CASES),
    *(("ray", stage) for stage in CASES if stage in {*NO_PRESET, *KINDS}),
]


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


@pytest.mark.parametrize("check", OF_ENGINES)
@pytest.mark.parametrize("stage", KINDS)
@pytest.mark.parametrize("other", ["batched", "ray"], indirect=True)
def test_stage_on_other_engines(other, stage, check):
    CHECKS[check](CASES[stage], other.of(CASES[stage].stage))


@pytest.mark.parametrize(("other", "stage"), ON, indirect=["other"])
def test_engines_go_the_same_way_to_the_bit(stage, other, bench):
    reference, course = (place.of(CASES[stage].stage).run(CASES[stage].pipeline()) for place in (bench, other))
    for one, two in zip(reference.after, course.after, strict=True):
        assert torch.equal(come_to(one), come_to(two)) and all(map(tree.equal, one.states, two.states))
    assert memories(reference) == memories(course)


@pytest.mark.parametrize(
    ("stacked", "stage"), [on for on in ON if on[0] == "batched" or on[1] in KINDS], indirect=["stacked"]
)
def test_stacks_differ_from_one_client_at_a_time_in_the_last_digits(stage, stacked, bench):
    reference, course = (place.of(CASES[stage].stage).run(CASES[stage].pipeline()) for place in (bench, stacked))
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
