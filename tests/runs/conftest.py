"""Data of a small federation, a cache of its own, and one finished run that tests may read."""

from __future__ import annotations

from pathlib import Path

import pytest

import fedllm
from tests.runs.small import small, write_records


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is worked out once is kept here, not with the user's."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_cache(request: pytest.FixtureRequest, session_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests with a real model need the user's cache; all others stay out of it."""
    if request.node.get_closest_marker("model") is None:
        monkeypatch.setenv("FEDLLM_CACHE", str(session_cache))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of three clients."""
    return write_records(tmp_path_factory.mktemp("data") / "people.jsonl")


@pytest.fixture(scope="session")
def finished(data: Path, session_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> fedllm.Result:
    """A finished run of `small(data)`; read it, change nothing in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDLLM_CACHE", str(session_cache))
        return fedllm.run(small(data), out=tmp_path_factory.mktemp("finished") / "run", name="small")
