"""A process for each client, over local sockets: a rehearsal of a deployment, on one machine.

    server    run_round -> Call -> SiteLinks --frames-->  site process    SiteService: no model, no PyTorch
                                                              |           model process: Site, one client's records

What crosses is the experiment as text and messages as bytes, in pieces of 4 MB. Each client's process reads its own
records alone. A process that is killed is started again, and its request goes on where it was; memories are files with
versions, so the run has the same bits as on the serial engine. It does not start where clients are many: for them the
engine `batched` is there.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from fedllm.engines.base import Engine
from fedllm.engines.loopback import ReceivedReply, Reply, receive
from fedllm.engines.remote.model_process import LOG
from fedllm.engines.remote.site_links import Ready, SiteFailure, SiteLinks
from fedllm.engines.remote.worker import to_text
from fedllm.errors import ConfigError, RunError
from fedllm.events import Emit, EngineAdjusted, EngineStarted
from fedllm.experiment.record import Experiment
from fedllm.messages import serialization
from fedllm.messages.call import Call, Replies
from fedllm.messages.update import Failure, Request

MOST_SITES = 64
START = 120.0  # seconds in which a process starts
MODULE = "fedllm.engines.remote.site_process"


@dataclass(frozen=True)
class Sites(Engine):
    """The engine.

    Args:
        patience: seconds in which a client whose process was lost may come back, before the round goes on without it.
    """

    patience: float = 60.0

    def __post_init__(self) -> None:
        if not self.patience > 0:
            raise ConfigError(f"engine.sites.patience is {self.patience}; it must be above 0")

    @contextmanager
    def open(self, experiment: Experiment, folder: Path | None, emit: Emit) -> Iterator[Call]:
        """Start the processes, let each load the task and its client's records; answer calls until closed.

        Raises:
            ConfigError: the experiment is not one that a file can hold, or there are too many clients.
            RunError: a process cannot begin.
        """
        text, clients = to_text(experiment).encode(), experiment.federation.load(experiment.key).clients
        if len(clients) > MOST_SITES:
            raise ConfigError(
                f"the engine sites starts processes for each of {len(clients)} clients, and at most {MOST_SITES} are "
                "allowed; use the engine batched"
            )
        with TemporaryDirectory(prefix="fedllm-") as place:
            notes: list[str] = []
            links = SiteLinks(Path(place) / "server.sock", frozenset(clients), self.patience, notes.append)
            processes = SiteProcesses(clients, Path(place), folder)
            try:
                with ThreadPoolExecutor(len(clients)) as pool:
                    calls = SiteCalls(links, pool, emit, notes)
                    calls.begin(clients, text, processes.last_words)
                    yield calls
            finally:
                links.close()
                processes.close()


@dataclass(eq=False)
class SiteCalls:
    """Answers calls: all sites work at once, and what they have made is fetched in request order, one at a time.

    `notes`: the sites whose connection was lost since the last event that told of it."""

    links: SiteLinks
    pool: ThreadPoolExecutor
    emit: Emit
    notes: list[str]

    def begin(self, clients: Sequence[str], text: bytes, last_words: Callable[[str], str]) -> None:
        """Give each site the experiment. `last_words`: the end of a client's log.

        Raises:
            RunError: one cannot run it, or has loaded another model than the others.
        """
        under_way = {client: self.pool.submit(self.links.begin, client, text, START) for client in clients}
        found = []
        for client, future in under_way.items():
            try:
                found.append(future.result().told)
            except SiteFailure as failure:
                said = last_words(client)
                raise RunError(f"the process of client {client} cannot begin: {said or failure}") from None
        if len({told.get("model") for told in found}) > 1:
            raise RunError("the clients' processes have loaded different base models; give all of them the same files")
        parameters = found[0].get("parameters")
        self.emit(EngineStarted(len(clients), 1, None, parameters if isinstance(parameters, int) else 0, None))

    def __call__(self, name: str, requests: Mapping[str, Request]) -> Replies:
        """Replies in request order."""
        sent = {client: serialization.serialize(request) for client, request in requests.items()}
        under_way = {client: self.pool.submit(self.links.ask, client, name, data) for client, data in sent.items()}
        for client, future in under_way.items():
            request, data = requests[client], sent.pop(client)
            try:
                reply = self._fetched(client, name, data, future.result())
            except SiteFailure as failure:
                lost = serialization.serialize(Failure(client, request.ctx.round, f"{failure}"))
                reply = Reply(lost, None, len(data))
            while self.notes:
                text = f"the connection to the site {self.notes.pop()} was lost; its request goes on over the next one"
                self.emit(EngineAdjusted(request.ctx.round, text))
            yield client, receive(name, request, ReceivedReply.of(reply, name, request), self.emit)

    def _fetched(self, client: str, name: str, data: bytes, ready: Ready) -> Reply:
        found = self.links.fetch(client, name, data, ready)
        return Reply(found, _parts(ready.told.get("parts")), len(data))


class SiteProcesses:
    """A process for each site, started again when it ends. They end with this one."""

    def __init__(self, sites: Sequence[str], place: Path, memories: Path | None) -> None:
        self._place, self._open, self._lock = place, True, threading.Lock()
        self._memories = place / "clients" if memories is None else memories.absolute()
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        for site in sites:
            threading.Thread(target=self._keep, args=(site,), daemon=True).start()

    def close(self) -> None:
        """End them all."""
        with self._lock:
            self._open = False
            running = list(self._running.values())
        for process in running:
            process.kill()
            process.wait()

    def last_words(self, site: str) -> str:
        """The last line of what its process with the model has said; empty if there is none."""
        try:
            lines = (self._logs(site) / LOG).read_text(errors="replace").split("\n")
        except OSError:
            return ""
        return next((line for line in reversed(lines) if line.strip()), "").strip()

    def _logs(self, site: str) -> Path:
        return self._place / "logs" / site

    def _keep(self, site: str) -> None:
        while True:
            with self._lock:
                if not self._open:
                    return
                process = self._running[site] = subprocess.Popen(self._command(site), stdin=subprocess.DEVNULL)
            process.wait()
            time.sleep(0.1)  # one that cannot start is not tried without pause

    def _command(self, site: str) -> list[str]:
        told = {"--site": site, "--socket": self._place / "server.sock", "--folder": self._memories}
        more = {"--logs": self._logs(site), "--place": Path.cwd()}
        options = [str(word) for pair in {**told, **more}.items() for word in pair]
        return [sys.executable, "-m", MODULE, *options]


def _parts(told: object) -> Mapping[str, int] | None:
    """The bytes of an update's parts, as its site counts them; None for a failure."""
    if not isinstance(told, dict):
        return None
    with suppress(TypeError, ValueError):
        return {str(name): int(size) for name, size in told.items()}
    return None
