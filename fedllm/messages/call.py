"""A call: the server asks clients by name and gets one reply for each request."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from fedllm.messages.update import Failure, Request, Update

Replies = Iterator[tuple[str, Update | Failure]]


Call = Callable[[str, Mapping[str, Request]], Replies]  # (name, requests) -> replies in request order
