"""Clients of an aggregator without an engine, a model or a federation: what they hold is given."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from fedllm.aggregators.base import Aggregator, ClientSession
from fedllm.aggregators.keyring import Keyring
from fedllm.messages.call import Replies
from fedllm.messages.context import ClientContext, RoundContext
from fedllm.messages.update import Failure, Request, Update, sent_hash
from fedllm.rng import Key
from fedllm.stages.base import Stage
from fedllm.tensors.tree import Tree


@dataclass
class Conversation:
    """A call to clients whose updates are known. `lost`: (call, client) that do not answer."""

    aggregator: Aggregator
    updates: Mapping[str, Update]
    lost: Collection[tuple[str, str]] = ()
    keyring: Keyring = field(default_factory=Keyring)
    refusals: list[tuple[str, str, str]] = field(default_factory=list)
    heard: dict[tuple[str, str], Update] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sessions: dict[str, ClientSession] = {}

    def requests(self, params: Tree | None = None) -> dict[str, Request]:
        """Of one round."""
        size = len(self.updates)
        return {name: Request(params or {}, (), context(name, place, size)) for place, name in enumerate(self.updates)}

    def __call__(self, name: str, requests: Mapping[str, Request]) -> Replies:
        for client, request in requests.items():
            if (name, client) in self.lost:
                yield client, Failure(client, request.ctx.round, "lost")
                continue
            if name == "work":
                self.sessions[client] = ClientSession(request.ctx, keyring=self.keyring, sent=sent_hash(request))
                reply = self.aggregator.seal(self.updates[client], self.sessions[client])
            else:
                reply = self.aggregator.handlers()[name](request, self.sessions[client])
            self.heard[name, client] = reply
            yield client, reply

    def refused(self, name: str, client: str, reason: str) -> None:
        """By the aggregator."""
        self.refusals.append((name, client, reason))


def context(client: str, slot: int, size: int) -> RoundContext:
    """Of a first round."""
    return RoundContext(0, Key(5), size, size, client=client, slot=slot)


def encoded(stage: Stage, updates: Mapping[str, Update]) -> dict[str, Update]:
    """What a stage makes of them."""
    return {
        name: stage.encode(update, {}, {}, ClientContext(context(name, place, len(updates))))[0]
        for place, (name, update) in enumerate(updates.items())
    }
