"""Aggregators: many updates to one. An aggregator drives the round's conversations through `call`.

A plain sum makes one call ("work"); secure aggregation makes several. On the client's side `handlers` answer the
further calls and `seal` is the last thing that happens to an update before the wire; both share a session.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fedllm.aggregators.keyring import Keyring
from fedllm.messages.call import Call
from fedllm.messages.context import RoundContext
from fedllm.messages.traits import Fact, Traits
from fedllm.messages.update import Request, Update


@dataclass
class ClientSession:
    """What a client remembers within one round, on its own side; dropped when the round ends.

    keyring: the identities of the client's site. sent: hash of the parameters that the client was sent.
    """

    ctx: RoundContext
    notes: dict[str, Any] = field(default_factory=dict)
    keyring: Keyring = field(default_factory=Keyring)
    sent: bytes = b""


Handler = Callable[[Request, ClientSession], Update]


@dataclass(frozen=True)
class Aggregator:
    """A frozen dataclass of settings. `upload`: the call by which a client's update reaches the sum, where this is not
    the one that `reduce` is asked for."""

    upload: ClassVar[str | None] = None

    @property
    def traits(self) -> Traits:
        """What it declares, for `check`: by default that the server can read the update of each client. One that hides
        them sets `traits` to what it needs for that, as `Traits(needs=Fact.INTEGERS)`."""
        return Traits(loses=Fact.HIDDEN)

    def handlers(self) -> Mapping[str, Handler]:
        """Further calls that a client answers, by name."""
        return {}

    def seal(self, update: Update, session: ClientSession) -> Update:
        """Client side, after all stages, before the wire."""
        return update

    def reduce(self, call: Call, requests: Mapping[str, Request], name: str = "work") -> Update:
        """Talk to the clients and return the total. Nobody answered: an update without parts.

        Raises:
            RoundVoid: the sum cannot be had; the round counts as an empty one.
        """
        raise NotImplementedError
