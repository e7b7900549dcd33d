"""The process with a site's base model: it builds the experiment from its text, and answers requests for one client.

python -m fedllm.engines.remote.model_worker FD --client NAME --folder FOLDER --place PLACE
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fedllm.engines.allocator import retain_freed_memory
from fedllm.engines.client import Site
from fedllm.engines.loopback import serve
from fedllm.engines.remote import frames
from fedllm.engines.remote.model_process import MOST
from fedllm.engines.remote.site_service import BEGIN
from fedllm.engines.torch_threads import one_thread
from fedllm.errors import FedllmError
from fedllm.experiment import config_file
from fedllm.models.layers.quantized_linear import num_parameters


class ModelWorker:
    """Holds the base model and answers for its client. What goes wrong is told to the site's log, and to the server as
    one of the site's refusals."""

    def __init__(self, client: str, folder: Path) -> None:
        self.client, self.folder = client, folder
        self.site: Site | None = None

    def handle(self, call: str, request: bytes) -> tuple[Mapping[str, Any], bytes]:
        """A call to an answer, or to the code of a refusal."""
        try:
            return self._begin(request) if call == BEGIN else self._answer(call, request)
        except (torch.OutOfMemoryError, MemoryError) as error:
            return self._refused("memory", error)
        except FedllmError as error:
            return self._refused("experiment" if call == BEGIN else "failed", error)

    def _begin(self, text: bytes) -> tuple[Mapping[str, Any], bytes]:
        held, self.site = self.site, None
        experiment = config_file.build(json.loads(text))
        same = held is not None and held.model.task == experiment.task
        self.folder.mkdir(parents=True, exist_ok=True)
        model = held.model if held is not None and same else None
        self.site = Site.of(experiment, self.folder, model, client=self.client)
        self.site.tell = _told
        base = self.site.model.base
        return {"parameters": int(num_parameters(base.model)), "model": base.digest}, b""

    def _answer(self, call: str, request: bytes) -> tuple[Mapping[str, Any], bytes]:
        if self.site is None:
            return {"refused": "not_begun"}, b""
        (reply,) = serve(self.site, call, [request])
        return {"parts": reply.parts}, reply.data

    def _refused(self, code: str, error: BaseException) -> tuple[Mapping[str, Any], bytes]:
        print(" ".join(str(error).split()), file=sys.stderr, flush=True)
        return {"refused": code}, b""


def _told(text: str) -> str:
    """An error may quote a client's data: its text goes to the site's log, and the server hears that there is one."""
    print(" ".join(text.split()), file=sys.stderr, flush=True)
    return "its site has refused or failed; the site's own log says why"


def main(arguments: Sequence[str] | None = None) -> None:
    """Answer until the site's process closes the socket, or ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("fd", type=int)
    parser.add_argument("--client", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--place", type=Path, required=True, help="the working directory of relative paths")
    options = parser.parse_args(arguments)
    os.chdir(options.place)
    _end_with(os.getppid())
    worker = ModelWorker(options.client, options.folder)
    with socket.socket(fileno=options.fd) as link, one_thread(), retain_freed_memory():
        while True:
            try:
                head, body = frames.receive(link, MOST)
            except ConnectionResetError:
                return
            frames.send(link, *worker.handle(str(head["call"]), body))


def _end_with(parent: int) -> None:
    """End when the site's process does, also in the middle of a step."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main()
