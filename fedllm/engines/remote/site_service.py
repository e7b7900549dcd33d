"""A site's side of a conversation: it takes requests in pieces, lets the process with the model answer, and hands out
the answer in pieces.

    put {id, at, size} + bytes    a piece of a request; the reply says how many bytes are there, so that a transfer goes
                                  on where a lost connection has left it
    ask {id, call}                the request is whole: begin with it
    get {id, at}                  a piece of the answer, or that it is not ready
    drop {id}                     it is no longer needed

`id` is the SHA-256 of the call's name and the request. So a request that comes twice is answered once, and one that was
damaged on its way is refused. What crosses is data: a reason why not is one of `REFUSALS`, and never the text of an
exception, which may hold a path or a record of the site.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotReady
from dataclasses import dataclass
from typing import Any, Protocol

from fedllm.engines.remote.frames import CHUNK, Frame, Head

WAIT = 0.5  # seconds that a `get` waits for an answer
OPEN = 4  # requests that a site holds at once
BEGIN = "begin"  # the call whose request is the experiment's text

REFUSALS = {
    "bad_request": "it was sent something that is no request",
    "damaged": "a request arrived damaged",
    "too_large": "a request is larger than it accepts",
    "busy": "it was sent more requests at once than it holds",
    "not_begun": "it was asked before it was given the experiment",
    "experiment": "it cannot run the experiment; its own log says why",
    "memory": "it has run out of memory",
    "process_lost": "the process with its model was lost again and again",
    "failed": "it could not do its work; its own log says why",
}


class Refusal(Exception):
    """Why a site does not answer."""

    def __init__(self, code: str) -> None:
        super().__init__(REFUSALS[code])
        self.code = code


@dataclass(frozen=True)
class Answer:
    """What the process with the model has made of a request. `told`: plain values that go with it."""

    data: bytes
    told: Mapping[str, Any]


class Worker(Protocol):
    """The process with the model."""

    def answer(self, call: str, request: bytes) -> Answer:
        """
        Raises:
            Refusal: it cannot be done.
        """
        ...


def request_id(call: str, request: bytes | bytearray) -> str:
    """SHA-256 of the call's name and the request."""
    found = hashlib.sha256(len(call.encode()).to_bytes(4, "big") + call.encode())
    found.update(request)
    return found.hexdigest()


class SiteService:
    """Answers frames. `most`: bytes of a request that it accepts."""

    def __init__(self, worker: Worker, most: int = 4 << 30) -> None:
        self._worker, self._most = worker, most
        self._incoming: dict[str, bytearray] = {}
        self._answers: dict[str, Future[Answer]] = {}
        self._pool = ThreadPoolExecutor(1)  # one after another, as a site has one model
        self._operations: dict[str, Callable[[str, Head, bytes], Frame]] = {
            "put": self._put,
            "ask": self._ask,
            "get": self._get,
            "drop": self._drop,
        }

    def handle(self, head: Head, body: bytes) -> Frame:
        """One frame to one frame, within seconds. Whatever comes in, it is answered."""
        try:
            operation, about = self._operations.get(str(head.get("op"))), head.get("id")
            if operation is None or not isinstance(about, str) or len(about) != 64:
                raise Refusal("bad_request")
            return operation(about, head, body)
        except Refusal as refusal:
            return {"refused": refusal.code}, b""

    def close(self) -> None:
        """Begin with nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _put(self, about: str, head: Head, body: bytes) -> Frame:
        at, size = _number(head, "at"), _number(head, "size")
        if size > self._most:
            raise Refusal("too_large")
        if about in self._answers:
            return {"have": size}, b""
        if about not in self._incoming and len(self._incoming) == OPEN:
            self._incoming.pop(next(iter(self._incoming)))  # the oldest: who asked for it has gone
        held = self._incoming.setdefault(about, bytearray())
        if at == len(held) and at + len(body) <= size:
            held += body
        return {"have": len(held)}, b""

    def _ask(self, about: str, head: Head, body: bytes) -> Frame:
        call = head.get("call")
        if not isinstance(call, str):
            raise Refusal("bad_request")
        if about not in self._answers:
            if len(self._answers) == OPEN:
                raise Refusal("busy")
            held = bytes(self._incoming.pop(about, b""))
            if request_id(call, held) != about:
                raise Refusal("damaged")
            self._answers[about] = self._pool.submit(self._worker.answer, call, held)
        return {}, b""

    def _get(self, about: str, head: Head, body: bytes) -> Frame:
        at = _number(head, "at")
        if about not in self._answers:
            raise Refusal("not_begun")
        try:
            answer = self._answers[about].result(WAIT)
        except NotReady:
            return {"ready": False}, b""
        except Refusal:
            self._answers.pop(about)  # asked again, it is tried again
            raise
        return {"ready": True, "size": len(answer.data), "told": answer.told}, answer.data[at : at + CHUNK]

    def _drop(self, about: str, head: Head, body: bytes) -> Frame:
        self._incoming.pop(about, None)
        if about in self._answers and self._answers[about].done():
            self._answers.pop(about)
        return {}, b""


def _number(head: Head, name: str) -> int:
    value = head.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise Refusal("bad_request")
    return value
