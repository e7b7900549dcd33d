"""Ray's actors give the serial engine's bits, also when they are lost; what cannot run on Ray is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import fedllm
from fedllm.data.shards import ClientOutage, Shards
from fedllm.engines.base import Engine
from fedllm.engines.registry import choose, engine_of
from fedllm.engines.remote.ray import Ray, RayActors
from fedllm.errors import CheckError, ConfigError, MissingExtra, RunError
from fedllm.events import ClientFailed, EngineAdjusted, EngineStarted, Event, RoundStarted
from fedllm.experiment.record import Experiment
from fedllm.models.adapters.weights import Norms
from fedllm.models.loaded_model import load
from fedllm.stages.base import Stage
from tests.doubles.kept import Kept, pid
from tests.runs.small import Stop, StopAt, adapter_hash, events, figures, history, small, stateful, write_records

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Own(Stage):
    """A stage that no catalog has."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Records of three clients; 6, 3 and 2 of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDLLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield write_records(tmp_path_factory.mktemp("data") / "people.jsonl")


@pytest.fixture(scope="module")
def serial(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds with SCAFFOLD, momentum, top-k and personal leaves on the serial engine."""
    return run(stateful(data, rounds=2), "serial", tmp_path_factory.mktemp("serial"))


def run(experiment: Experiment, engine: str | Engine, folder: Path, *listeners: Callable[[Event], None]) -> Path:
    return fedllm.run(experiment, engine=engine, out=folder / "run", listeners=listeners).folder


def same(one: Path, two: Path) -> None:
    """Parameters, states, memories, every figure and every message are the same."""
    assert adapter_hash(one) == adapter_hash(two)
    assert saved(one) == saved(two) != {}
    engine = {"engine", "event", "reason"}
    assert {k: v for k, v in figures(one).items() if k not in engine} == {
        k: v for k, v in figures(two).items() if k not in engine
    }
    assert told(one) == told(two)


def saved(folder: Path) -> Mapping[str, bytes]:
    found = (folder / "checkpoints").rglob("*.safetensors")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def told(folder: Path) -> list[dict[str, Any]]:
    """The log, without what an engine says of itself."""
    own = ("engine_chosen", "engine_started", "engine_adjusted", "engine_stopped")
    return [
        {k: v for k, v in record.items() if k != "engine"} for record in history(folder) if record["event"] not in own
    ]


def test_one_client_a_stack_gives_the_serial_bits(
    data: Path, serial: Path, ray_actors: RayActors, tmp_path: Path
) -> None:
    found = run(stateful(data, rounds=2), Kept(ray_actors), tmp_path)
    same(found, serial)
    (started,) = (event for event in events(found) if isinstance(event, EngineStarted))
    assert (started.workers, started.stack, started.memory_budget, started.peak) == (2, 1, None, None)
    assert started.parameters == load(stateful(data).task).base.model.num_parameters()


def test_stacks_give_the_serial_digits(data: Path, ray_actors: RayActors, tmp_path: Path) -> None:
    experiment = stateful(data, rounds=1, task__dtype="float64")
    found = {}
    for name, engine in {"serial": "serial", "ray": Kept(ray_actors, stack=2)}.items():
        result = fedllm.run(experiment, engine=engine, out=tmp_path / name)
        found[name] = {leaf: value.double() for leaf, value in result.params.items()}
    start = load(experiment.task).initial_params(experiment.key)
    off = moved = 0.0
    for leaf, value in found["serial"].items():
        off += float((found["ray"][leaf] - value).norm() ** 2)
        moved += float((value - start[leaf]).norm() ** 2)
    assert moved > 0 and off**0.5 <= 1e-9 * moved**0.5


@pytest.mark.parametrize(
    ("aggregator", "lost_in", "needs"),
    [
        ({"secure_sum": {"corrupt": 0, "min_survivors": 2}}, "work", "cryptography"),
        ({"homomorphic_sum": {"min_clients": 2}}, "work", "tenseal"),
    ],
)
def test_a_secret_sum_is_the_plain_sum(
    aggregator: Any, lost_in: str, needs: str, data: Path, ray_actors: RayActors, tmp_path: Path
) -> None:
    """Over several calls, with memories; keys in files that all actors see; one client lost in the second round."""
    pytest.importorskip("ray")
    pytest.importorskip(needs)
    stages: list[Any] = ["scaffold", "uniform", *(["fixed_point"] if "secure_sum" in aggregator else [])]

    def lost(call: str, **changes: Any) -> Experiment:
        made = small(data, rounds=2, stages=stages, evaluation__metrics=[], **changes)
        assert isinstance(made.federation, Shards)
        return replace(made, federation=replace(made.federation, failures=(ClientOutage("ben", 1, call),)))

    secret = lost(lost_in, aggregator=aggregator, demands={"secrecy": True})
    found = run(secret, Kept(ray_actors), tmp_path / "secret")
    same_secret = run(secret, "serial", tmp_path / "serial")
    assert adapter_hash(found) == adapter_hash(same_secret)
    assert saved(found) == saved(same_secret)
    if "secure_sum" in aggregator:
        assert adapter_hash(found) == adapter_hash(run(lost("work"), "serial", tmp_path / "plain"))
    assert [event.client for event in events(found) if isinstance(event, ClientFailed)] == ["ben"]


def test_a_lost_actor_is_replaced_and_changes_no_bit(
    data: Path, serial: Path, ray_actors: RayActors, tmp_path: Path
) -> None:
    """It is stopped when round 1 begins, so that it holds requests, and killed a moment later."""
    ray = pytest.importorskip("ray")
    process, other = ray.get([worker.__ray_call__.remote(pid) for worker in ray_actors.workers])

    def kill(event: Event) -> None:
        if isinstance(event, RoundStarted) and event.round == 1:
            os.kill(process, signal.SIGSTOP)
            threading.Timer(0.3, os.kill, (process, signal.SIGKILL)).start()

    found = run(stateful(data, rounds=2), Kept(ray_actors), tmp_path, kill)
    same(found, serial)
    (note,) = (event for event in events(found) if isinstance(event, EngineAdjusted))
    assert note.round == 1 and "lost while it worked on ann" in note.text and "another one takes its place" in note.text
    new, same_one = ray.get([worker.__ray_call__.remote(pid) for worker in ray_actors.workers])
    assert same_one == other and new not in (process, other)


def test_a_run_on_ray_is_resumed_to_the_bit(data: Path, serial: Path, ray_actors: RayActors, tmp_path: Path) -> None:
    second = StopAt(lambda event: isinstance(event, RoundStarted) and event.round == 1)
    with pytest.raises(Stop):
        run(stateful(data, rounds=2), Kept(ray_actors), tmp_path, second)
    found = fedllm.run(stateful(data, rounds=2), engine=Kept(ray_actors), out=tmp_path / "run", resume=True).folder
    assert adapter_hash(found) == adapter_hash(serial)
    assert saved(found) == saved(serial)


def test_an_actor_that_cannot_write_ends_the_run(data: Path, ray_actors: RayActors, tmp_path: Path) -> None:
    def block(event: Event) -> None:
        if isinstance(event, RoundStarted):
            clients = tmp_path / "run" / "checkpoints" / "clients"
            clients.rmdir()
            clients.write_text("no folder")

    with pytest.raises(RunError, match="could not be written"):
        run(stateful(data, rounds=1), Kept(ray_actors), tmp_path, block)


LIFE = """
import os, signal, sys, threading, time
from pathlib import Path
import ray
from fedllm.runs import launch
from fedllm.engines.remote.ray import Ray
from fedllm.events import RoundStarted
from tests.doubles.kept import Kept, pid
from tests.runs.small import stateful

data, out = sys.argv[1:]

def press(event):
    if isinstance(event, RoundStarted) and event.round == 1:
        os.kill(process, signal.SIGSTOP)  # so that it is waited for
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()

def lives(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False

try:
    with Ray(actors=1).started() as actors:
        process = ray.get(actors.workers[0].__ray_call__.remote(pid))
        launch.run(stateful(data, rounds=2), engine=Kept(actors), out=out, listeners=[press])
except launch.Interrupted as stopped:
    patience = time.monotonic() + 60  # the system ends it in its own time
    while lives(process) and time.monotonic() < patience:
        time.sleep(0.1)
    print(stopped.rounds, ray.is_initialized(), lives(process))
"""


@pytest.mark.slow
def test_a_ray_of_its_own_ends_at_ctrl_c(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    words = [sys.executable, "-c", LIFE, str(data), str(tmp_path / "run")]
    told = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert told.stdout.split() == ["1", "False", "False"], told.stdout + told.stderr


@pytest.mark.parametrize(
    ("engine", "sentence"),
    [
        ("{ray: {stack: 0}}", "engine.ray.stack is 0; it must be 1 or more"),
        ("{ray: {actors: 0}}", "engine.ray.actors is 0; it must be 1 or more"),
        ("{ray: {gpus_per_actor: -1}}", "engine.ray.gpus_per_actor is -1"),
        ("{ray: {stacks: 2}}", "did you mean 'stack'"),
    ],
)
def test_wrong_settings_are_refused(engine: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        engine_of(engine)


def test_settings_are_read() -> None:
    assert engine_of("ray") == Ray()
    assert engine_of("{ray: {stack: 4, actors: 2, address: auto}}") == Ray(4, 2, None, "auto")


def test_more_actors_than_there_is_room_for(data: Path, ray_actors: RayActors, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"actors is 999, but with 3 cores and 0 GPUs.* room for 3; lower"):
        run(small(data), Ray(actors=999), tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "resources", "device", "share"),
    [
        (Ray(), {"CPU": 8.0}, "auto", (8, 0)),
        (Ray(), {"CPU": 8.0, "GPU": 2.0}, "auto", (2, 1)),
        (Ray(), {"CPU": 8.0, "GPU": 2.0}, "cpu", (8, 0)),
        (Ray(gpus_per_actor=0.25), {"CPU": 9.0, "GPU": 2.0}, "auto", (8, 0.25)),
        (Ray(gpus_per_actor=0.25), {"CPU": 5.0, "GPU": 2.0}, "auto", (5, 0.25)),
        (Ray(actors=1), {"CPU": 8.0, "GPU": 2.0}, "cuda", (1, 1)),
    ],
)
def test_actors_by_what_ray_has(
    settings: Ray, resources: dict[str, float], device: str, share: tuple[int, float]
) -> None:
    assert settings._share(resources, device) == share


def test_python_of_ones_own_is_refused_before_anything_starts(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    experiment = small(data)
    with pytest.raises(ConfigError, match=r"test_ray:Own is Python of your own"):
        run(replace(experiment, stages=(Own(), *experiment.stages)), Ray(), tmp_path)
    assert not (tmp_path / "run").exists()


def test_without_ray_the_install_line(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fedllm.experiment.yaml import write_yaml
    from tests.runs.small import command, spec

    monkeypatch.setitem(sys.modules, "ray", None)
    line = r"ray is not installed; install it with: pip install 'fedllm\[ray\]'"
    with pytest.raises(MissingExtra, match=line):
        run(small(data), "ray", tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(write_yaml(spec(data)))
    code, _, err = command(capsys, "run", "mine.yaml", "--engine", "ray", "--out", "run")
    assert code == 2
    assert err.strip() == "fedllm: ray is not installed; install it with: pip install 'fedllm[ray]'"
    assert not Path("run").exists()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "auto"])
def test_a_cluster_that_is_not_there(address: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # another test's may be running

    def nobody(**settings: object) -> None:
        raise ConnectionError("Could not find any running Ray instance.\nmore")

    monkeypatch.setattr(ray, "init", nobody)
    with pytest.raises(RunError, match=f"engine.ray.address: Ray cannot be reached at {address} .*ray start --head"):
        run(small(data), Ray(address=address), tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_ray_that_does_not_start_in_time(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)

    def late(**settings: object) -> None:
        raise Exception("The current node timed out during startup.")  # the type that Ray raises

    monkeypatch.setattr(ray, "init", late)
    with pytest.raises(RunError, match=r"could not be started on this machine .*timed out.* serial or batched"):
        run(small(data), Ray(), tmp_path)


def test_only_stacks_demand_clients_that_can_be_stacked(data: Path) -> None:
    experiment = small(data, task__adapter="norms")
    model = load(experiment.task)
    assert not Norms.stackable
    assert choose(Ray(), experiment, model) == (Ray(), "it was asked for")
    with pytest.raises(CheckError, match="engine ray: adapter norms trains one client at a time; use --engine serial"):
        choose(Ray(stack=2), experiment, model)


def test_ray_is_imported_by_its_engine_alone() -> None:
    words = "import sys, fedllm.experiment.catalog, fedllm.engines.remote.worker; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", words], cwd=ROOT, check=False).returncode == 0
