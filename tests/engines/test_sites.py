"""A process for each client gives the serial engine's bits, also when processes are killed."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import fedllm
from fedllm.engines.client import Site
from fedllm.engines.registry import engine_of
from fedllm.engines.remote.model_worker import ModelWorker
from fedllm.engines.remote.site_links import Ready, SiteFailure
from fedllm.engines.remote.site_service import BEGIN
from fedllm.engines.remote.sites import SiteCalls, SiteProcesses, Sites
from fedllm.errors import ConfigError, RunError
from fedllm.events import ClientFailed, EngineAdjusted, EngineStarted, Event, RoundStarted
from fedllm.experiment import config_file
from fedllm.messages import serialization
from fedllm.messages.context import RoundContext
from fedllm.messages.update import Failure, Part, Request, Update
from fedllm.rng import Key
from fedllm.runs.server_round import initial_state, requests_for
from tests.runs.small import adapter_hash, events, figures, history, small, stateful, write_records

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are found in /proc")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Records of three clients; 6, 3 and 2 of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDLLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield write_records(tmp_path_factory.mktemp("data") / "people.jsonl")


def processes(module: str, name: str) -> list[int]:
    """Of this engine, by module and client; the children of this process and theirs."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"fedllm.engines.remote.{module}".encode() in words and name.encode() in words and descends(int(place.name)):
            found.append(int(place.name))
    return found


def descends(pid: int) -> bool:
    while pid > 1:
        if pid == os.getpid():
            return True
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
    return False


def same_history(folder: Path) -> list[dict[str, Any]]:
    """Without the engine's name."""
    return [{key: value for key, value in event.items() if key != "engine"} for event in history(folder)]


def test_processes_that_are_killed_cost_no_bit(data: Path, tmp_path: Path) -> None:
    """SCAFFOLD, momentum, top-k and leaves that stay at home. In round 1 ann's process with the model is killed, in
    round 2 the site process of ben, which takes its model with it."""
    asked = stateful(data, rounds=3)

    def kill(event: Event) -> None:
        if isinstance(event, RoundStarted) and event.round > 0:
            module, name = {1: ("model_worker", "ann"), 2: ("site_process", "ben")}[event.round]
            (pid,) = processes(module, name)
            os.kill(pid, signal.SIGKILL)

    serial = fedllm.run(asked, engine="serial", out=tmp_path / "serial")
    sites = fedllm.run(asked, engine="sites", out=tmp_path / "sites", listeners=[kill])
    assert adapter_hash(sites.folder) == adapter_hash(serial.folder)
    assert figures(sites.folder) == {**figures(serial.folder), "engine": "sites"}
    assert same_history(sites.folder) == same_history(serial.folder)
    told = events(sites.folder)
    assert not any(isinstance(event, ClientFailed) for event in told)
    (started,) = [event for event in told if isinstance(event, EngineStarted)]
    assert (started.workers, started.stack) == (3, 1) and started.parameters > 0
    (lost,) = [event for event in told if isinstance(event, EngineAdjusted)]
    assert "the connection to the site ben was lost" in lost.text and lost.round == 2
    assert not processes("site_process", "ann") and not processes("model_worker", "ann")


def test_what_goes_wrong_on_a_client_stays_in_its_sites_log(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A call that nobody answers: the serial engine tells the server why, and a site its own log alone."""
    made = small(data)
    site = Site.of(made, None, client="ann")
    run = initial_state(made, site.fresh)
    everyone = RoundContext(0, made.key, 1, 3, 3)
    request = requests_for(made, run, ["ann"], everyone)["ann"]
    plain = site.answer("wrok", request)
    assert isinstance(plain, Failure) and "has no answer" in plain.reason
    worker = ModelWorker("ann", tmp_path / "ann")
    worker.handle(BEGIN, json.dumps(config_file.dump(made)).encode())
    _, answer = worker.handle("wrok", serialization.serialize(request))
    reply = serialization.deserialize(answer)
    assert isinstance(reply, Failure) and "wrok" not in reply.reason and "the site's own log says why" in reply.reason
    assert "has no answer to the call 'wrok'" in capsys.readouterr().err


def test_a_site_that_does_not_answer_is_its_own_clients_failure() -> None:
    """Replies come in request order, and the round goes on."""

    class Links:
        def ask(self, site: str, call: str, request: bytes) -> Ready:
            if site == "ben":
                raise SiteFailure("it has run out of memory", "memory")
            return Ready(site, len(request), {"parts": {"metrics": 8}})

        def fetch(self, site: str, call: str, request: bytes, ready: Ready) -> bytes:
            return serialization.serialize(Update({"metrics": Part({"loss": torch.tensor(1.0)}, 0.0)}))

    heard: list[Event] = []
    requests = {name: Request({}, (), context(name)) for name in ("ann", "ben", "cid")}
    with ThreadPoolExecutor(3) as pool:
        calls = SiteCalls(Links(), pool, heard.append, ["cid"])  # type: ignore[arg-type]
        found = dict(calls("work", requests))
    assert list(found) == ["ann", "ben", "cid"]
    assert found["ben"] == Failure("ben", 3, "it has run out of memory")
    assert isinstance(found["cid"], Update) and float(found["cid"].parts["metrics"].tree["loss"]) == 1.0
    (lost,) = [event for event in heard if isinstance(event, EngineAdjusted)]
    assert lost.text == "the connection to the site cid was lost; its request goes on over the next one"


def context(name: str) -> RoundContext:
    return RoundContext(3, Key(0), 3, 3, client=name)


def test_bad_settings_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"engine\.sites\.patience is 0\.0; it must be above 0"):
        engine_of("{sites: {patience: 0}}")
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"prompt": "a", "response": "b"}) + "\n" for _ in range(65)))
    many = small(path, federation__shards={"data": str(path), "clients": 65, "heldout": 0.0})
    with (
        pytest.raises(ConfigError, match="starts processes for each of 65 clients, and at most 64"),
        Sites().open(many, tmp_path, lambda event: None),
    ):
        pass


def test_a_process_that_cannot_begin_ends_the_run_with_a_reason(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedllm.engines.remote.model_process.MODULE", "fedllm.no_such_module")
    monkeypatch.setattr("fedllm.engines.remote.sites.SiteProcesses", InProcess)
    with pytest.raises(RunError, match=r"the process of client ann cannot begin: .*no_such_module"):
        fedllm.run(small(data, rounds=1), engine="sites", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


class InProcess(SiteProcesses):
    """Sites in threads of this process; so what they start can be exchanged."""

    def __init__(self, sites: tuple[str, ...], place: Path, memories: Path | None) -> None:
        self._place = place
        import threading

        from fedllm.engines.remote.site_process import main

        for site in sites:
            told = ["--site", site, "--socket", str(place / "server.sock"), "--folder", str(place / "clients")]
            more = ["--logs", str(place / "logs" / site), "--place", str(Path.cwd())]
            threading.Thread(target=main, args=([*told, *more],), daemon=True).start()

    def close(self) -> None:
        """They end with their connections."""
