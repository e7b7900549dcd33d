"""One client after another in this process: the reference that every other engine must equal.

The base model is loaded once; requests and updates pass through `wire.py`, so bytes are counted as sent. One intra-op
thread: its bits do not depend on the number of cores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from fedllm import wire
from fedllm.aggregate import Call, Replies
from fedllm.client import Site
from fedllm.events import Emit, Wire
from fedllm.experiment import Experiment
from fedllm.state import ClientStore
from fedllm.tasks.model import load
from fedllm.update import Failure, Request, Update


@dataclass(frozen=True)
class Serial:
    """The serial engine."""

    @contextmanager
    def open(self, experiment: Experiment, folder: Path | None, emit: Emit) -> Iterator[Call]:
        """Load the task and the clients' data; answer calls until closed."""
        with one_thread():
            store = ClientStore(folder, experiment.limits.keep_last * experiment.limits.checkpoint_every)
            population = experiment.federation.load(experiment.key)
            yield over_wire(Site(experiment, load(experiment.task), population, store), emit)


def over_wire(site: Site, emit: Emit) -> Call:
    """Calls to a site of this process, through bytes."""

    def call(name: str, requests: Mapping[str, Request]) -> Replies:
        for client, request in requests.items():
            sent = wire.pack(request)
            emit(Wire(request.ctx.round, name, client, "down", len(sent), wire.part_bytes(request)))
            received = wire.unpack(sent)
            assert isinstance(received, Request)
            answer = site.answer(name, received)
            back = wire.pack(answer)
            if isinstance(answer, Update):
                emit(Wire(request.ctx.round, name, client, "up", len(back), wire.part_bytes(answer)))
            reply = wire.unpack(back)
            assert isinstance(reply, Update | Failure)
            yield client, reply

    return call


@contextmanager
def one_thread() -> Iterator[None]:
    """One intra-op thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
