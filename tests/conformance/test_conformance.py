"""Every stage of the catalog under every check of the suite; and every check under stages that are broken."""

from __future__ import annotations

import pytest

from fedllm.catalog import STAGES, name_of
from tests.conformance.bench import Bench
from tests.conformance.suite import CHECKS
from tests.conformance.table import CASES
from tests.conformance.twins import TWINS


@pytest.fixture(scope="session")
def bench(tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("conformance"))


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
    CHECKS[check](CASES[stage], bench)


@pytest.mark.parametrize("twin", TWINS, ids=lambda twin: type(twin.stage).__name__)
def test_a_broken_stage_is_caught(twin, bench):
    with pytest.raises(twin.error):
        CHECKS[twin.caught_by](twin.case(CASES[twin.of]), bench)


def test_every_stage_has_a_broken_twin_and_every_check_catches_one():
    assert {twin.of for twin in TWINS} == STAGES.keys()
    assert {twin.caught_by for twin in TWINS} == CHECKS.keys()
