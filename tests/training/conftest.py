"""Float64 models compute in float64 throughout, so that bounds follow from it (`wide`)."""

from __future__ import annotations

import pytest

from tests.wide import widen


@pytest.fixture(autouse=True)
def wide(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where other processes compute the same, which no patch reaches."""
    if "ray_actors" not in request.fixturenames:
        widen(monkeypatch)
