"""The partition worker: a process of its own, its cache, and its failures."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest

from fedllm.data import flwr_partitioners, hub_worker
from fedllm.data.flwr_partitioners import PartitionJob, run
from fedllm.errors import DataError, MissingExtra

pytestmark = pytest.mark.skipif(find_spec("flwr_datasets") is None, reason="flwr-datasets is not installed")

ARGUMENTS = {"num_partitions": 3, "partition_by": "value", "alpha": 1.0, "min_partition_size": 1, "seed": 5}
JOB = PartitionJob("DirichletPartitioner", ARGUMENTS, 30, tuple(f"ü{row % 3}" for row in range(30)))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path))
    return tmp_path / "partitions"


@pytest.mark.slow
def test_a_process_of_its_own_gives_the_same_and_is_started_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = run(JOB)
    assert groups == hub_worker.assign(asdict(JOB))
    (entry,) = cache.iterdir()
    assert json.loads(entry.read_text()) == groups
    assert "ü" not in entry.read_text()
    monkeypatch.setattr(flwr_partitioners, "WORKER", Path("nowhere.py"))
    assert run(JOB) == groups
    with pytest.raises(DataError, match=r"the partitioner failed: .*nowhere\.py"):
        run(PartitionJob("LinearPartitioner", {"num_partitions": 2}, 9))


def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str) -> None:
    path = tmp_path / "stand_in.py"
    path.write_text(code)
    monkeypatch.setattr(flwr_partitioners, "WORKER", path)


ONE_GROUP = "import json, sys; print(json.dumps({'groups': [list(range(json.load(sys.stdin)['count']))]}))"


@pytest.mark.parametrize(
    "content", ["", "[[0, 1], [1]]", "[[0, 30]]", "[[-1]]", "[0]", "{}", '[["0"]]', "[[true]]", "5"]
)
def test_a_damaged_entry_is_worked_out_again(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    stand_in(monkeypatch, tmp_path, ONE_GROUP)
    wanted = [list(range(30))]
    assert run(JOB) == wanted
    (entry,) = cache.iterdir()
    entry.write_text(content)
    assert run(JOB) == wanted
    assert json.loads(entry.read_text()) == wanted


def test_another_job_is_another_entry(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, tmp_path, ONE_GROUP)
    run(JOB)
    run(PartitionJob(JOB.partitioner, {**ARGUMENTS, "seed": 6}, JOB.count, JOB.values))
    run(PartitionJob(JOB.partitioner, ARGUMENTS, JOB.count, tuple(reversed(JOB.values or ()))))
    assert len(list(cache.iterdir())) == 3


def test_a_cache_that_cannot_be_written_to_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path / "file"))
    stand_in(monkeypatch, tmp_path, ONE_GROUP)
    assert run(JOB) == [list(range(30))]


def test_refusals_and_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, tmp_path, 'print(\'{"error": "too few"}\')')
    with pytest.raises(DataError, match=r"^too few$"):
        run(JOB)
    stand_in(monkeypatch, tmp_path, "import sys; print('noise', file=sys.stderr); sys.exit('the reason')")
    with pytest.raises(DataError, match=r"^the partitioner failed: the reason$"):
        run(JOB)
    stand_in(monkeypatch, tmp_path, "import time; time.sleep(60)")
    monkeypatch.setattr(flwr_partitioners, "SECONDS", 0.1)
    with pytest.raises(DataError, match="took more than 0 s"):
        run(JOB)


def test_the_worker_sends_no_telemetry_and_imports_nothing_that_lies_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would take modules of this package for those of another one: it has the names of theirs."""
    code = "import os, sys; beside = os.path.dirname(os.path.abspath(__file__)) in map(os.path.abspath, sys.path)\n"
    code += "sys.exit(os.environ['FLWR_TELEMETRY_ENABLED'] + str(beside))"
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    stand_in(monkeypatch, tmp_path, code)
    with pytest.raises(DataError, match=r"failed: 0False$"):
        run(JOB)
    hub_worker.assign(asdict(PartitionJob("LinearPartitioner", {"num_partitions": 2}, 9)))
    assert os.environ["FLWR_TELEMETRY_ENABLED"] == "0"


def test_without_flwr_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(flwr_partitioners.metadata, "version", version)
    with pytest.raises(MissingExtra, match=r"flwr-datasets is not installed.*'fedllm\[data\]'"):
        run(JOB)
