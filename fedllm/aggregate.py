"""Aggregators: many updates to one. An aggregator drives the round's conversations through `call`.

A plain sum makes one call ("work"); secure aggregation makes several. On the client's side `handlers` answer the
further calls and `seal` is the last thing that happens to an update before the wire; both share a session.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from fedllm import tree
from fedllm.errors import ClientError
from fedllm.update import Ctx, Failure, Part, Request, Update

Sees = Literal["sum", "each"]
Replies = Iterator[tuple[str, Update | Failure]]
Call = Callable[[str, Mapping[str, Request]], Replies]  # (name, requests) -> replies in request order


@dataclass
class Session:
    """What a client remembers within one round, on its own side; dropped when the round ends."""

    ctx: Ctx
    notes: dict[str, Any] = field(default_factory=dict)


Handler = Callable[[Request, Session], Update]


@dataclass(frozen=True)
class Aggregator:
    """`sees` says what the method is given: the "sum", or "each" update."""

    sees: ClassVar[Sees] = "sum"
    secret: ClassVar[bool] = False  # hides each update from the server
    needs_integers: ClassVar[bool] = False

    def handlers(self) -> Mapping[str, Handler]:
        """Further calls that a client answers, by name."""
        return {}

    def seal(self, update: Update, session: Session) -> Update:
        """Client side, after all stages, before the wire."""
        return update

    def reduce(self, call: Call, requests: Mapping[str, Request], name: str = "work") -> Update:
        """Talk to the clients and return the total. Nobody answered: an update without parts."""
        raise NotImplementedError


@dataclass(frozen=True)
class Sum(Aggregator):
    """The sum of all parts and weights; a part is added up over those who sent it. Integers stay integers.

    Streams: it holds the total and one reply, whatever the size of the cohort. Replies are the aggregator's own: the
    first to bring a part becomes its total, so whoever watches the call keeps copies.
    """

    def reduce(self, call: Call, requests: Mapping[str, Request], name: str = "work") -> Update:
        """One call; replies are added in the order in which they come, which is that of the requests.

        Raises:
            ClientError: a reply does not fit those before it.
        """
        totals: dict[str, Part] = {}
        for client, reply in call(name, requests):
            if isinstance(reply, Update):
                totals |= _added(totals, reply, client)
            del reply  # before the next one arrives
        return Update(totals)


def _added(totals: Mapping[str, Part], reply: Update, client: str) -> dict[str, Part]:
    return {
        name: _plus(totals.get(name), part, f"client {client}, part '{name}'") for name, part in reply.parts.items()
    }


def _plus(total: Part | None, part: Part, who: str) -> Part:
    """total + part, in total's own memory."""
    if part.weight is None:
        raise ClientError(f"{who} has no weight; put a stage that weighs (by_examples or uniform) before the sum")
    if total is None or total.weight is None:
        return Part(part.tree, part.weight)
    if tree.forms(part.tree) != tree.forms(total.tree):
        raise ClientError(f"{who} has other leaves, shapes or types than those of the clients before it")
    tree.add_(total.tree, part.tree)
    return Part(total.tree, total.weight + part.weight)
