"""A site's conversation with a server: in pieces, once, and whatever comes in."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.engines.remote import frames, site_links
from fedllm.engines.remote.site_links import SiteFailure, SiteLinks
from fedllm.engines.remote.site_process import greeting, serve_link
from fedllm.engines.remote.site_service import Answer, Refusal, SiteService, request_id
from fedllm.errors import WireError


class Reverser:
    """Answers a request with its bytes in reverse order."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def answer(self, call: str, request: bytes) -> Answer:
        self.asked.append(call)
        if call == "refuse":
            raise Refusal("memory")
        return Answer(request[::-1], {"parts": {"delta": len(request)}})


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 7 bytes, so that short messages need many."""
    for module in ("site_links", "site_service"):
        monkeypatch.setattr(f"fedllm.engines.remote.{module}.CHUNK", 7)


class Site:
    """A site in a thread. `cut`: bytes after which each connection of it ends, one after another; then they last."""

    def __init__(self, path: Path, worker: Reverser, name: str = "ann", cut: tuple[int, ...] = ()) -> None:
        self.service, self.path, self.name, self.cut, self.sent = SiteService(worker), path, name, cut, 0
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        cuts: Iterator[int] = iter(self.cut)
        while not self.stopped.is_set():
            with socket.socket(socket.AF_UNIX) as link:
                try:
                    link.connect(str(self.path))
                    frames.send(link, greeting(self.name))
                    serve_link(Cut(link, next(cuts, 1 << 60)), self.service)  # type: ignore[arg-type]
                except OSError:
                    self.stopped.wait(0.01)


class Cut:
    """A connection that ends when so many bytes have come in."""

    def __init__(self, link: socket.socket, left: int) -> None:
        self.link, self.left = link, left
        self.sendall = link.sendall

    def recv(self, size: int) -> bytes:
        found = self.link.recv(min(size, self.left)) if self.left > 0 else b""
        self.left -= len(found)
        return found


@contextmanager
def connected(
    tmp_path: Path, *, cut: tuple[int, ...] = (), patience: float = 5.0, name: str = "ann"
) -> Iterator[tuple[SiteLinks, Reverser, list[str]]]:
    lost: list[str] = []
    links, worker = SiteLinks(tmp_path / "s", frozenset({"ann", "ben"}), patience, lost.append), Reverser()
    site = Site(tmp_path / "s", worker, name, cut)
    try:
        yield links, worker, lost
    finally:
        site.stopped.set()
        links.close()


def exchanged(links: SiteLinks, request: bytes, call: str = "work") -> bytes:
    return links.fetch("ann", call, request, links.ask("ann", call, request))


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("size", [0, 1, 6, 7, 8, 100])
def test_a_message_of_any_size_comes_through_in_pieces(tmp_path: Path, size: int) -> None:
    with connected(tmp_path) as (links, worker, lost):
        assert exchanged(links, bytes(range(size))) == bytes(range(size))[::-1]
    assert worker.asked == ["work"] and not lost


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("cut", [(130,), (300,), (600,), (1000, 300, 900, 1500), (2500,)])
def test_a_transfer_goes_on_where_a_connection_has_left_it(tmp_path: Path, cut: tuple[int, ...]) -> None:
    """Wherever it ends, the work is done once, and no piece but the last one is sent again."""
    request = bytes(range(70))
    with connected(tmp_path, cut=cut) as (links, worker, lost):
        puts = counted_puts(links)
        assert exchanged(links, request) == request[::-1]
    assert worker.asked == ["work"]
    assert lost == ["ann"] * len(lost) and 1 <= len(lost) <= len(cut)
    assert len(puts) <= 10 + 2 * len(cut)


def counted_puts(links: SiteLinks) -> list[int]:
    puts: list[int] = []
    exchange = site_links.Link.exchange

    def counting(link: site_links.Link, head: frames.Head, body: Any = b"") -> frames.Frame:
        if head["op"] == "put":
            puts.append(len(body))
        return exchange(link, head, body)

    site_links.Link.exchange = counting  # type: ignore[method-assign]
    links_close = links.close

    def close() -> None:
        site_links.Link.exchange = exchange  # type: ignore[method-assign]
        links_close()

    links.close = close  # type: ignore[method-assign]
    return puts


def test_a_request_that_comes_twice_is_answered_once_until_it_is_dropped(tmp_path: Path) -> None:
    with connected(tmp_path) as (links, worker, _):
        first = links.ask("ann", "work", b"abc")
        again = links.ask("ann", "work", b"abc")
        assert first == again and worker.asked == ["work"]
        assert links.fetch("ann", "work", b"abc", again) == b"cba"
        assert links.fetch("ann", "work", b"abc", again) == b"cba", "asked again, for nobody has it any more"
    assert worker.asked == ["work", "work"]


def test_the_name_of_a_call_is_part_of_a_request(tmp_path: Path) -> None:
    with connected(tmp_path) as (links, worker, _):
        assert exchanged(links, b"abc", "work") == exchanged(links, b"abc", "evaluate") == b"cba"
    assert worker.asked == ["work", "evaluate"] and request_id("a", b"bc") != request_id("ab", b"c")


def test_a_refusal_is_one_of_a_list_and_is_told(tmp_path: Path) -> None:
    with connected(tmp_path) as (links, worker, _):
        with pytest.raises(SiteFailure, match="it has run out of memory"):
            links.ask("ann", "refuse", b"abc")
        assert exchanged(links, b"abc") == b"cba", "the connection lasts"
        with pytest.raises(SiteFailure, match="it has run out of memory"):
            links.ask("ann", "refuse", b"abc")
    assert worker.asked == ["refuse", "work", "refuse"], "a refused request may be tried again"


@pytest.mark.parametrize("name", ["mallory", "", "../ann"])
def test_only_the_sites_of_the_run_are_let_in(tmp_path: Path, name: str) -> None:
    gone = r"it is not connected, and did not come back within 0\.2 s"
    with connected(tmp_path, name=name, patience=0.2) as (links, worker, _), pytest.raises(SiteFailure, match=gone):
        links.ask("ann", "work", b"abc")
    assert not worker.asked


def test_a_site_of_another_protocol_is_not_let_in(tmp_path: Path) -> None:
    with connected(tmp_path, name="ben", patience=0.2) as (links, _, _):
        with socket.socket(socket.AF_UNIX) as link:
            link.connect(str(tmp_path / "s"))
            frames.send(link, {**greeting("ann"), "protocol": 99})
            assert link.recv(1) == b""
        with pytest.raises(SiteFailure, match="it is not connected"):
            links.ask("ann", "work", b"abc")


def test_a_silent_site_has_lost_its_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site_links, "SILENCE", 0.1)
    lost: list[str] = []
    links = SiteLinks(tmp_path / "s", frozenset({"ann"}), 0.3, lost.append)
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(str(tmp_path / "s"))
        frames.send(link, greeting("ann"))
        with pytest.raises(SiteFailure, match="it is not connected"):
            links.ask("ann", "work", b"abc")
    links.close()
    assert lost == ["ann"]


def test_nobody_else_of_the_machine_may_connect(tmp_path: Path) -> None:
    with connected(tmp_path):
        assert (tmp_path / "s").stat().st_mode & 0o077 == 0


def test_a_request_that_is_damaged_or_too_large_is_refused() -> None:
    worker = Reverser()
    service = SiteService(worker, most=10)
    put = {"op": "put", "id": request_id("work", b"abc"), "at": 0, "size": 3}
    assert service.handle({**put, "size": 11}, b"") == ({"refused": "too_large"}, b"")
    assert service.handle(put, b"abX") == ({"have": 3}, b"")
    assert service.handle({"op": "ask", "id": put["id"], "call": "work"}, b"") == ({"refused": "damaged"}, b"")
    assert service.handle(put, b"abcd") == ({"have": 0}, b""), "more than was announced is not taken"
    assert service.handle({**put, "at": 1}, b"bc") == ({"have": 0}, b""), "nor what does not follow"
    assert not worker.asked


def test_a_site_holds_few_requests_at_once() -> None:
    service = SiteService(Reverser())
    for number in range(20):
        service.handle({"op": "put", "id": f"{number:064d}", "at": 0, "size": 100}, bytes(50))
    assert len(service._incoming) == 4
    about = [request_id("work", bytes([number])) for number in range(6)]
    found = []
    for number, one in enumerate(about):
        service.handle({"op": "put", "id": one, "at": 0, "size": 1}, bytes([number]))
        found.append(service.handle({"op": "ask", "id": one, "call": "work"}, b"")[0])
    assert found == [{}, {}, {}, {}, {"refused": "busy"}, {"refused": "busy"}]


heads = st.dictionaries(
    st.sampled_from(["op", "id", "at", "size", "call", "x"]),
    st.one_of(
        st.sampled_from(["put", "ask", "get", "drop", "0" * 64, "work"]),
        *(
            st.none(),
            st.booleans(),
            st.integers(),
            st.floats(),
            st.text(max_size=5),
            st.lists(st.integers(), max_size=2),
        ),
    ),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(heads, st.binary(max_size=5)), max_size=5))
def test_whatever_comes_in_is_answered_and_never_reaches_the_model(asked: list[tuple[dict[str, Any], bytes]]) -> None:
    worker = Reverser()
    service = SiteService(worker)
    for head, body in asked:
        told, found = service.handle(head, body)
        assert found == b"" and set(told) <= {"refused", "have"}
    assert not worker.asked


@pytest.mark.parametrize(
    ("sent", "error", "reason"),
    [
        (struct.pack(">IQ", 1 << 31, 0), WireError, "bytes; at most 65536"),
        (struct.pack(">IQ", 2, 1 << 60), WireError, "bytes; at most 65536"),
        (struct.pack(">IQ", 2, 0) + b"[]", WireError, "no JSON object"),
        (struct.pack(">IQ", 3, 0) + b"{]}", WireError, "no JSON"),
        (struct.pack(">IQ", 60000, 0) + b"[" * 60000, WireError, "no JSON"),
        (struct.pack(">IQ", 2, 5) + b"{}abc", ConnectionResetError, "closed the connection"),
        (b"\0\0", ConnectionResetError, "closed the connection"),
    ],
)
def test_what_is_no_frame_is_refused(sent: bytes, error: type[Exception], reason: str) -> None:
    one, two = socket.socketpair()
    with one, two:
        one.sendall(sent)
        one.shutdown(socket.SHUT_WR)
        with pytest.raises(error, match=reason):
            frames.receive(two)


def test_a_frame_comes_out_as_it_went_in() -> None:
    one, two = socket.socketpair()
    with one, two:
        frames.send(one, {"op": "put", "ä": [1, None]}, b"\0\1")
        assert frames.receive(two) == ({"op": "put", "ä": [1, None]}, b"\0\1")
        with pytest.raises(WireError, match="head of a frame has"):
            frames.send(one, {"x": "y" * 70000})


def test_a_site_needs_no_pytorch() -> None:
    """Its process is the one that lives on when the one with the model is killed."""
    import subprocess
    import sys

    code = "import fedllm.engines.remote.site_process, sys, json; print(json.dumps('torch' in sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(found.stdout) is False
