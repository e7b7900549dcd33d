"""A call: the server asks clients by name and gets one reply for each request."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol, runtime_checkable

from fedllm.messages.update import Failure, Request, Update

Replies = Iterator[tuple[str, Update | Failure]]


Call = Callable[[str, Mapping[str, Request]], Replies]  # (name, requests) -> replies in request order


@runtime_checkable
class Recorder(Protocol):
    """A call that keeps a log of who is lost."""

    def refused(self, name: str, client: str, reason: str) -> None:
        """A reply came and was left out."""
        ...


def refuse(call: Call, name: str, client: str, reason: str) -> None:
    """Tell a call that an aggregator leaves out a client's reply to `name`, and why."""
    if isinstance(call, Recorder):
        call.refused(name, client, reason)
