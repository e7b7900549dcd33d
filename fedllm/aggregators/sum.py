"""The sum of all parts and weights; a part is added up over those who sent it. Integers stay integers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedllm.aggregators.base import Aggregator
from fedllm.errors import ClientError
from fedllm.messages.call import Call
from fedllm.messages.update import Part, Request, Update
from fedllm.tensors import tree


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
        raise ClientError(f"{who} has other tensors, shapes or types than those of the clients before it")
    tree.add_(total.tree, part.tree)
    return Part(total.tree, total.weight + part.weight)
