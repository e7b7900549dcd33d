"""One exchange with clients of this process through bytes, so that what is counted is what would be sent."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

from fedllm.engines.allocator import trim
from fedllm.engines.client import Site
from fedllm.errors import WireError
from fedllm.events import Emit, MessageSent
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
class ReceivedReply:
    """A reply that was read. `size`: its bytes."""

    answer: Update | Failure
    size: int
    parts: Mapping[str, int] | None
    sent: int

    @staticmethod
    def of(reply: Reply, name: str, request: Request) -> ReceivedReply:
        """To a call. What cannot be read, or is not what the request asks for, is a failure of its client."""
        try:
            answer = serialization.deserialize(reply.data, request.asks(name))
            if isinstance(answer, Request):
                raise WireError("a request stands where an answer was asked for")
        except WireError as error:
            answer = Failure(str(request.ctx.client), request.ctx.round, f"its reply is refused: {error}")
        return ReceivedReply(answer, len(reply.data), reply.parts, reply.sent)


def round_trip(site: Site, name: str, requests: Sequence[Request]) -> list[ReceivedReply]:
    """The way to the clients and back: requests to replies, both as bytes in between."""
    found = serve(site, name, map(serialization.serialize, requests))
    return [ReceivedReply.of(reply, name, request) for reply, request in zip(found, requests, strict=True)]


def serve(site: Site, name: str, sent: Iterable[bytes]) -> Iterator[Reply]:
    """The clients' side: requests as bytes to replies as bytes, of which one at a time is there."""
    requests, sizes = [], []
    for data in sent:
        request = serialization.deserialize(data)
        assert isinstance(request, Request)
        requests.append(site.base_versions.taken(request))
        sizes.append(len(data))
        del data, request
    for answer, size in zip(site.answers(name, requests), sizes, strict=True):
        yield Reply(
            serialization.serialize(answer),
            serialization.part_bytes(answer) if isinstance(answer, Update) else None,
            size,
        )


def receive(name: str, request: Request, reply: ReceivedReply, emit: Emit) -> Update | Failure:
    """The server's side: an answer, and what both messages weighed."""
    client, round = str(request.ctx.client), request.ctx.round
    emit(MessageSent(round, name, client, "down", reply.sent, serialization.part_bytes(request)))
    if reply.parts is not None:
        emit(MessageSent(round, name, client, "up", reply.size, reply.parts))
    return reply.answer


def one_by_one(site: Site, emit: Emit) -> Call:
    """Calls to a site of this process, one client after another."""

    def call(name: str, requests: Mapping[str, Request]) -> Replies:
        for client, request in requests.items():
            (reply,) = round_trip(site, name, [request])
            yield client, receive(name, request, reply, emit)

    return call


def with_heap_trim(call: Call) -> Call:
    """The call; after each `TIDY` replies, of one call or of several, the heap's free pages go back to the system.

    A tokenizer remembers words (up to 10,000). Each lies between blocks that are freed and taken again, and splits one:
    a population of 10,000 has let a worker's heap grow from 18 to 83 MB in this way, with 5 MB of it in use.
    """

    replies = count(1)

    def tidy(name: str, requests: Mapping[str, Request]) -> Replies:
        for reply, number in zip(call(name, requests), replies, strict=False):
            yield reply
            if number % TIDY == 0:
                trim()

    return tidy
