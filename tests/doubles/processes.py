"""An engine with a process for each client. Nothing but bytes goes between them: frames with a name and a message.

    frame    8 bytes length | content
    start    YAML: the experiment, and the folder of the memories
    ask      name of the call, serialize(request)        answer   serialize(update or failure)

A process is started with its client's first request and lives until the engine is closed. Each builds its own site.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch
import yaml

from fedllm.aggregators.base import Aggregator
from fedllm.engines.base import Engine
from fedllm.engines.client import Site
from fedllm.engines.client_store import ClientStore
from fedllm.errors import RunError
from fedllm.events import Emit, MessageSent
from fedllm.experiment import catalog, config_file
from fedllm.experiment.record import Experiment
from fedllm.messages import serialization
from fedllm.messages.call import Call, Replies
from fedllm.messages.update import Failure, Request, Update
from fedllm.models.loaded_model import load
from fedllm.stages.base import Stage
from tests.doubles.masks import Masked, Rounding

ROOT = Path(__file__).resolve().parents[2]
DOUBLES: Mapping[type, Mapping[str, type]] = {Stage: {"rounding": Rounding}, Aggregator: {"masked": Masked}}


@dataclass(frozen=True)
class Processes(Engine):
    """The engine."""

    @contextmanager
    def open(self, experiment: Experiment, folder: Path | None, emit: Emit) -> Iterator[Call]:
        """A call that reaches a process for each client."""
        start = {"experiment": config_file.dump(experiment), "folder": str(folder) if folder else None}
        with ExitStack() as stack:  # at its end the pipes are closed, at whose end the processes end
            yield Workers(yaml.safe_dump(start).encode(), emit, stack)


@dataclass(eq=False)
class Workers:
    """The processes that run, by client."""

    start: bytes
    emit: Emit
    stack: ExitStack
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __call__(self, name: str, requests: Mapping[str, Request]) -> Replies:
        """All are asked before the first answer is waited for."""
        for client, request in requests.items():
            data = serialization.serialize(request)
            self.emit(
                MessageSent(request.ctx.round, name, client, "down", len(data), serialization.part_bytes(request))
            )
            send(pipe(self.of(client).stdin), name.encode(), data)
        for client, request in requests.items():
            answer = receive(pipe(self.of(client).stdout))
            if answer is None:
                raise RunError(f"the process of client {client} has ended")
            reply = serialization.deserialize(answer)
            assert isinstance(reply, Update | Failure)
            if isinstance(reply, Update):
                self.emit(
                    MessageSent(request.ctx.round, name, client, "up", len(answer), serialization.part_bytes(reply))
                )
            yield client, reply

    def of(self, client: str) -> subprocess.Popen[bytes]:
        """The client's process."""
        if client not in self.running:
            command = [sys.executable, "-m", "tests.doubles.processes"]
            made = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
            self.running[client] = self.stack.enter_context(made)
            send(pipe(made.stdin), self.start)
        return self.running[client]


def send(file: IO[bytes], *contents: bytes) -> None:
    """Frames."""
    for content in contents:
        file.write(len(content).to_bytes(8, "little") + content)
    file.flush()


def receive(file: IO[bytes]) -> bytes | None:
    """A frame's content; None at the end."""
    length = int.from_bytes(file.read(8), "little")
    content = file.read(length)
    return content if length and len(content) == length else None


def pipe(file: IO[bytes] | None) -> IO[bytes]:
    """A process's end of a pipe."""
    assert file is not None
    return file


def know_doubles() -> None:
    """Let files of this process name the doubles."""
    for noun, table in DOUBLES.items():
        catalog.NOUNS[noun].update(table)  # type: ignore[attr-defined]


def serve(source: IO[bytes], sink: IO[bytes]) -> None:
    """One client's process."""
    torch.set_num_threads(1)
    know_doubles()
    start = yaml.safe_load(receive(source) or b"")
    experiment = config_file.build(start["experiment"])
    store = ClientStore(start["folder"] and Path(start["folder"]), keep=9)
    site = Site(experiment, load(experiment.task), experiment.federation.load(experiment.key), store)
    while (name := receive(source)) is not None:
        data = receive(source)
        assert data is not None
        request = serialization.deserialize(data)
        assert isinstance(request, Request)
        send(sink, serialization.serialize(site.answer(name.decode(), request)))


if __name__ == "__main__":
    frames = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no frame
    serve(sys.stdin.buffer, frames)
