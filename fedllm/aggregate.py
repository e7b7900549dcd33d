"""Aggregators: many updates to one. An aggregator drives the round's conversations through `call`.

A plain sum makes one call ("work"); secure aggregation makes several. On the client's side `handlers` answer the
further calls and `seal` is the last thing that happens to an update before the wire; both share a session.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from fedllm import tree
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
    """The sum of all parts and weights. Streams: memory does not grow with the cohort; integers stay integers."""

    def reduce(self, call: Call, requests: Mapping[str, Request], name: str = "work") -> Update:
        """One call; replies are added in request order."""
        totals: dict[str, Part] = {}
        for _, reply in call(name, requests):
            if isinstance(reply, Update):
                for part_name, part in reply.parts.items():
                    totals[part_name] = _plus(totals.get(part_name), part)
        return Update(totals)


def _plus(total: Part | None, part: Part) -> Part:
    """total + part; a reply is the aggregator's own, so the first one becomes the accumulator."""
    assert part.weight is not None, "a part reached the sum without a weight"
    if total is None:
        return Part(part.tree, part.weight)
    assert total.weight is not None
    tree.add_(total.tree, part.tree)
    return Part(total.tree, total.weight + part.weight)
