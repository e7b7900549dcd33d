"""One exchange with clients of this process through bytes, so that what is counted is what would be sent."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

from fedllm.engines.allocator import give_back
from fedllm.engines.client import Site
from fedllm.errors import WireError
from fedllm.events import Emit, Wire
from fedllm.messages import serialization
from fedllm.messages.call import Call, Replies
from fedllm.messages.update import Failure, Request, Update

TIDY = 500  # replies between two tidyings: of large populations


@dataclass(frozen=True)
class Reply:
    """A client's answer as bytes; `parts` are the bytes of its parts, None for a failure. `sent`: bytes of the
    request."""

    data: bytes
    parts: Mapping[str, int] | None
    sent: int


@dataclass(frozen=True, eq=False)
class Opened:
    """A reply that was read. `size`: its bytes."""

    answer: Update | Failure
    size: int
    parts: Mapping[str, int] | None
    sent: int

    @staticmethod
    def of(reply: Reply, name: str, request: Request) -> Opened:
        """To a call. What cannot be read, or is not what the request asks for, is a failure of its client."""
        try:
            answer = serialization.unpack(reply.data, request.asks(name))
            if isinstance(answer, Request):
                raise WireError("a request stands where an answer was asked for")
        except WireError as error:
            answer = Failure(str(request.ctx.client), request.ctx.round, f"its reply is refused: {error}")
        return Opened(answer, len(reply.data), reply.parts, reply.sent)


def answers(site: Site, name: str, requests: Sequence[Request]) -> list[Opened]:
    """The way to the clients and back: requests to replies, both as bytes in between."""
    found = replies(site, name, map(serialization.pack, requests))
    return [Opened.of(reply, name, request) for reply, request in zip(found, requests, strict=True)]


def replies(site: Site, name: str, sent: Iterable[bytes]) -> Iterator[Reply]:
    """The clients' side: requests as bytes to replies as bytes, of which one at a time is there."""
    requests, sizes = [], []
    for data in sent:
        request = serialization.unpack(data)
        assert isinstance(request, Request)
        requests.append(site.shift.taken(request))
        sizes.append(len(data))
        del data, request
    for answer, size in zip(site.answers(name, requests), sizes, strict=True):
        yield Reply(
            serialization.pack(answer), serialization.part_bytes(answer) if isinstance(answer, Update) else None, size
        )


def received(name: str, request: Request, reply: Opened, emit: Emit) -> Update | Failure:
    """The server's side: an answer, and what both messages weighed."""
    client, round = str(request.ctx.client), request.ctx.round
    emit(Wire(round, name, client, "down", reply.sent, serialization.part_bytes(request)))
    if reply.parts is not None:
        emit(Wire(round, name, client, "up", reply.size, reply.parts))
    return reply.answer


def one_by_one(site: Site, emit: Emit) -> Call:
    """Calls to a site of this process, one client after another."""

    def call(name: str, requests: Mapping[str, Request]) -> Replies:
        for client, request in requests.items():
            (reply,) = answers(site, name, [request])
            yield client, received(name, request, reply, emit)

    return call


def tidied(call: Call) -> Call:
    """The call; after each `TIDY` replies, of one call or of several, the heap's free pages go back to the system.

    A tokenizer remembers words (up to 10,000). Each lies between blocks that are freed and taken again, and splits one:
    a population of 10,000 has let a worker's heap grow from 18 to 83 MB in this way, with 5 MB of it in use.
    """

    replies = count(1)

    def tidy(name: str, requests: Mapping[str, Request]) -> Replies:
        for reply, number in zip(call(name, requests), replies, strict=False):
            yield reply
            if number % TIDY == 0:
                give_back()

    return tidy
