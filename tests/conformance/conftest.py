"""The bench, on every engine."""

from __future__ import annotations

import pytest

from fedllm.engines.batched.engine import Batched
from tests.conformance.bench import Bench
from tests.doubles.kept import Kept


@pytest.fixture(scope="session")
def bench(tmp_path_factory) -> Bench:
    """On the serial engine."""
    return Bench(tmp_path_factory.mktemp("conformance"))


@pytest.fixture(scope="session")
def other(request, tmp_path_factory) -> Bench:
    """On another engine, one client a stack."""
    engine = Batched(stack=1) if request.param == "batched" else Kept(request.getfixturevalue("ray_actors"))
    return Bench(tmp_path_factory.mktemp(request.param), engine)


@pytest.fixture(scope="session")
def stacked(request, tmp_path_factory) -> Bench:
    """On another engine, both clients in one stack."""
    engine = Batched(stack=2) if request.param == "batched" else Kept(request.getfixturevalue("ray_actors"), stack=2)
    return Bench(tmp_path_factory.mktemp(f"{request.param}-stacks"), engine)
