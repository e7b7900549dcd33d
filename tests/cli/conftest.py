"""What the tests of the command line share."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.runs.small import spec, write_records


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to stand in, with an experiment and its data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path / "cache"))
    write_records(tmp_path / "people.jsonl")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(spec("people.jsonl")), encoding="utf-8")
    return tmp_path
