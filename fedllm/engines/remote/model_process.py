"""The process that holds a site's base model, kept alive by one that holds nothing.

A process with a model may end at any time: the system takes it when memory is short, and no other is told. So the
site's own process loads no model and imports no PyTorch. It starts the one that does, gives it the experiment, and
starts it again when it is lost. A client's memories are files with versions, so a request that is asked again has the
same answer.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fedllm.engines.remote import frames
from fedllm.engines.remote.site_service import BEGIN, REFUSALS, Answer, Refusal

MODULE = "fedllm.engines.remote.model_worker"
LOG = "model.log"
LOSSES = 3  # processes lost on one request, before it is given up
MOST = 64 << 30  # bytes of a message between two processes of one site


class ModelProcess:
    """Answers requests, with a process that is started when it is needed. `options`: of its command line."""

    def __init__(self, options: Sequence[str], folder: Path) -> None:
        self._options, self._folder = options, folder
        self._process: subprocess.Popen[bytes] | None = None
        self._link: socket.socket | None = None
        self._begun: bytes | None = None  # the experiment that it was given
        self.lost = 0  # processes, so far

    @property
    def pid(self) -> int | None:
        """Of the process that runs, if one does."""
        return None if self._process is None else self._process.pid

    def answer(self, call: str, request: bytes) -> Answer:
        """
        Raises:
            Refusal: the experiment cannot be run, or the process is lost each time.
        """
        if call != BEGIN and self._begun is None:
            raise Refusal("not_begun")
        for _ in range(LOSSES):
            try:
                if call == BEGIN:
                    self._begun = request
                elif self._process is None:
                    self._exchange(BEGIN, self._begun or b"")
                return self._exchange(call, request)
            except OSError:
                self.close()
                self.lost += 1
        raise Refusal("process_lost")

    def close(self) -> None:
        """End the process."""
        if self._link is not None:
            self._link.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process, self._link = None, None

    def _exchange(self, call: str, request: bytes) -> Answer:
        link = self._link or self._start()
        frames.send(link, {"call": call}, request)
        head, body = frames.receive(link, MOST)
        if "refused" in head:
            code = head["refused"]
            raise Refusal(code if code in REFUSALS else "failed")
        return Answer(body, dict(head))

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        with theirs:
            log = self._folder / LOG
            self._folder.mkdir(parents=True, exist_ok=True)
            with log.open("ab") as told:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", MODULE, str(theirs.fileno()), *self._options],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=told,
                    stderr=told,
                )
        self._link = ours
        return ours
