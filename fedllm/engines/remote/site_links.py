"""The server's side of its conversations with sites: who is connected, and one request to one site, with its answer.

    put the request in pieces, ask, get until it is ready; then fetch the answer in pieces, and drop it

A connection may end at any point. The transfer then goes on where it was, over the site's next connection, for at most
`patience` seconds. A site that does not answer a frame within `SILENCE` seconds has lost its connection, too.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

from fedllm.engines.remote import frames
from fedllm.engines.remote.frames import CHUNK, Frame, Head
from fedllm.engines.remote.site_process import PROTOCOL
from fedllm.engines.remote.site_service import BEGIN, REFUSALS, request_id
from fedllm.errors import WireError

SILENCE = 3.0  # seconds in which each frame is answered; a `get` waits for half a second of them
MOST_ANSWER = 64 << 30  # bytes

Found = TypeVar("Found")


class SiteFailure(Exception):
    """Why a site has not answered a request, for people. `code`: of its refusal, if it has refused."""

    def __init__(self, text: str, code: str = "") -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True)
class Ready:
    """An answer that waits at its site. `told`: the plain values that go with it."""

    id: str
    size: int
    told: Mapping[str, Any]


class Link:
    """One connection to a site; one frame at a time."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket, self._lock = connection, threading.Lock()
        connection.settimeout(SILENCE)

    def exchange(self, head: Head, body: bytes | memoryview = b"") -> Frame:
        """
        Raises:
            OSError, WireError: the connection is of no more use.
            SiteFailure: the site refuses.
        """
        with self._lock:
            frames.send(self._socket, head, body)
            told, found = frames.receive(self._socket)
        if "refused" in told:
            code = str(told["refused"])
            raise SiteFailure(REFUSALS.get(code, "it refuses, for a reason that this version does not know"), code)
        return told, found

    def close(self) -> None:
        """End it, also under a frame that is under way."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


class SiteLinks:
    """Listens on a local socket; the sites that are connected, by name. Only `sites` are let in.

    Args:
        patience: seconds in which a site that was lost may come back.
        lost: is told the name of a site whose connection has ended in the middle of something.
    """

    def __init__(
        self, path: Path, sites: frozenset[str], patience: float, lost: Callable[[str], None] = lambda site: None
    ) -> None:
        self.patience, self._sites, self._lost = patience, sites, lost
        self._experiment = b""
        self._links: dict[str, Link] = {}
        self._changed = threading.Condition()
        self._listener = socket.socket(socket.AF_UNIX)
        before = os.umask(0o177)  # nobody else of this machine may connect
        try:
            self._listener.bind(str(path))
        finally:
            os.umask(before)
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """End all connections."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._changed:
            for link in self._links.values():
                link.close()
            self._links.clear()

    def begin(self, site: str, experiment: bytes, patience: float) -> Ready:
        """Give a site the experiment; also each later process of it that lacks it. Wait for at most `patience` seconds
        until it is there.

        Raises:
            SiteFailure: it refuses, or does not come.
        """
        self._experiment = experiment
        return self._over_any_link(site, partial(_asked, BEGIN, experiment), patience)

    def ask(self, site: str, call: str, request: bytes) -> Ready:
        """Send a request and wait until the site has the answer.

        Raises:
            SiteFailure: it refuses, or does not come back.
        """
        try:
            return self._over_any_link(site, partial(_asked, call, request), self.patience)
        except SiteFailure as failure:
            if failure.code != "not_begun":
                raise
        self.begin(site, self._experiment, self.patience)
        return self._over_any_link(site, partial(_asked, call, request), self.patience)

    def fetch(self, site: str, call: str, request: bytes, ready: Ready) -> bytes:
        """The bytes of an answer. A site that has lost it is asked again.

        Raises:
            SiteFailure: it refuses, or does not come back.
        """
        found = bytearray()

        def once(link: Link) -> None:
            while len(found) < ready.size:
                told, piece = link.exchange({"op": "get", "id": ready.id, "at": len(found)})
                if not piece or _count(told, "size") != ready.size:
                    raise WireError("an answer that is not the one that was announced")
                found.extend(piece)
            link.exchange({"op": "drop", "id": ready.id})

        try:
            self._over_any_link(site, once, self.patience)
        except SiteFailure as failure:
            if failure.code != "not_begun":  # of another process of the site than the one that had the answer
                raise
            found.clear()
            ready = self.ask(site, call, request)
            self._over_any_link(site, once, self.patience)
        return bytes(found)

    def _over_any_link(self, site: str, once: Callable[[Link], Found], patience: float) -> Found:
        """Do something over the site's connection; where that ends, over the next one."""
        while True:
            link = self._link(site, patience)
            try:
                return once(link)
            except (OSError, WireError):
                self._forget(site, link)
                self._lost(site)

    def _link(self, site: str, patience: float) -> Link:
        until = monotonic() + patience
        with self._changed:
            while site not in self._links:
                left = until - monotonic()
                if left <= 0:
                    raise SiteFailure(f"it is not connected, and did not come back within {patience:g} s")
                self._changed.wait(left)
            return self._links[site]

    def _forget(self, site: str, link: Link) -> None:
        link.close()
        with self._changed:
            if self._links.get(site) is link:
                self._links.pop(site)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._greet, args=(connection,), daemon=True).start()

    def _greet(self, connection: socket.socket) -> None:
        """Let a site in that says who it is; its newest connection counts."""
        connection.settimeout(SILENCE)
        try:
            head, _ = frames.receive(connection, most=0)
        except (OSError, WireError):
            connection.close()
            return
        site = head.get("site")
        if not isinstance(site, str) or site not in self._sites or head.get("protocol") != PROTOCOL:
            connection.close()
            return
        with self._changed:
            before = self._links.pop(site, None)
            self._links[site] = Link(connection)
            self._changed.notify_all()
        if before is not None:
            before.close()


def _asked(call: str, request: bytes, link: Link) -> Ready:
    """The request in pieces; then wait for the answer."""
    about, whole, at = request_id(call, request), memoryview(request), 0
    while True:
        head = {"op": "put", "id": about, "at": at, "size": len(request)}
        at = _count(link.exchange(head, whole[at : at + CHUNK])[0], "have")
        if at >= len(request):
            break
    link.exchange({"op": "ask", "id": about, "call": call})
    while True:
        told, _ = link.exchange({"op": "get", "id": about, "at": MOST_ANSWER})
        if told.get("ready") is True:
            known = told.get("told")
            return Ready(about, _count(told, "size"), known if isinstance(known, dict) else {})


def _count(head: Head, name: str) -> int:
    value = head.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MOST_ANSWER:
        raise WireError(f"a site's frame has no {name}")
    return value
