"""Aggregators: many updates to one. An aggregator drives the round's conversations through `call`.

A plain sum makes one call ("work"); secure aggregation makes several. On the client's side `handlers` answer the
further calls and `seal` is the last thing that happens to an update before the wire; both share a session.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from fedllm.messages.call import Call
from fedllm.messages.context import RoundContext
from fedllm.messages.update import Request, Update

Sees = Literal["sum", "each"]


@dataclass
class ClientSession:
    """What a client remembers within one round, on its own side; dropped when the round ends."""

    ctx: RoundContext
    notes: dict[str, Any] = field(default_factory=dict)


Handler = Callable[[Request, ClientSession], Update]


@dataclass(frozen=True)
class Aggregator:
    """`sees` says what the method is given: the "sum", or "each" update."""

    sees: ClassVar[Sees] = "sum"
    secret: ClassVar[bool] = False  # hides each update from the server
    needs_integers: ClassVar[bool] = False

    def handlers(self) -> Mapping[str, Handler]:
        """Further calls that a client answers, by name."""
        return {}

    def seal(self, update: Update, session: ClientSession) -> Update:
        """Client side, after all stages, before the wire."""
        return update

    def reduce(self, call: Call, requests: Mapping[str, Request], name: str = "work") -> Update:
        """Talk to the clients and return the total. Nobody answered: an update without parts."""
        raise NotImplementedError
