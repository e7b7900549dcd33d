"""Secure sums through the calls of a round: the server learns sums of the clients' integers, and nothing of one alone.

    work        trains; what is sent stays on the client, which tells its public key, the layout and its last round
    advertise   the manifest: who takes part, hash of the model, ring, k, t        keys of the round, a commitment
    share       everybody's keys                                                   encrypted shares for its neighbours
    mask        its neighbours' shares                                             its vector plus masks, modulo 2^m
    agree       the survivors                                                      a signature of this list
    unmask      everybody's signatures                                             one share for each neighbour

SecAgg+ (Bell et al. 2020, arXiv 2003.13445) with the consistency round of Bonawitz et al. 2017 (arXiv 1611.04482); the
protocol is in `privacy/secure_aggregation`, this file drives it through the calls of a round. An evaluation goes the
same way. Clients train before the first message, so that a slow one is not one that drops out.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedllm.aggregators.base import Aggregator, ClientSession, Handler
from fedllm.aggregators.vector_layout import VectorLayout
from fedllm.errors import ClientError, RoundVoid, SecureSumError, WireError, require
from fedllm.messages.call import Call, refuse
from fedllm.messages.context import RoundContext
from fedllm.messages.traits import Fact, Traits
from fedllm.messages.update import Part, Request, Update, sent_hash
from fedllm.privacy.secure_aggregation import client as protocol
from fedllm.privacy.secure_aggregation import server
from fedllm.privacy.secure_aggregation.manifest import Manifest, read_manifest
from fedllm.privacy.secure_aggregation.parameters import choose
from fedllm.privacy.secure_aggregation.policy import Content, Policy
from fedllm.privacy.secure_aggregation.primitives import CIPHERS, digest
from fedllm.privacy.secure_aggregation.recovery import finish
from fedllm.privacy.secure_aggregation.rings import largest_bound
from fedllm.tensors.byte_tensors import to_bytes, to_tensor


@dataclass(frozen=True)
class MaskedSum(Aggregator):
    """What the aggregators of secure sums have in common. They need a stage that yields integers, such as fixed_point.

    A round below the threshold or below `min_survivors`, or one in which somebody cheats, is void: an empty round with
    the reason. It is never a wrong sum. What a client holds until the others are done is one vector.

    Args:
        corrupt: fraction of a cohort that may work together with the server without learning more than the sum.
        dropout: fraction that may be lost after training, while the sum still comes about. Together with `corrupt` it
            sets the neighbours and the threshold; a small cohort may have room for one of the two alone.
        min_survivors: clients that a sum must be of; each client insists on it.
        ring: bits of the integers, as the stage has them: 16, 20 (packed, five bytes for two) or 32.
        cipher: of the masks, the same for all; chacha20 where processors have no instructions for AES.
    """

    corrupt: float = 0.1
    dropout: float = 0.1
    min_survivors: int = 3
    ring: Literal[16, 20, 32] = 32
    cipher: Literal["aes-128-ctr", "chacha20"] = "aes-128-ctr"

    traits = Traits(needs=Fact.INTEGERS, loses=Fact.ANY_RANK)
    upload: ClassVar[str | None] = "mask"

    def __post_init__(self) -> None:
        for name in ("corrupt", "dropout"):
            value = self.__dict__[name]
            require(0 <= value < 1, self, field=name, value=value, allowed="from 0 on and below 1")
        require(self.min_survivors >= 2, self, field="min_survivors", value=self.min_survivors, allowed="2 or more")
        require(self.ring in (16, 20, 32), self, field="ring", value=self.ring, allowed="16, 20 or 32")
        require(self.cipher in CIPHERS, self, field="cipher", value=self.cipher, allowed=" or ".join(sorted(CIPHERS)))

    def handlers(self) -> Mapping[str, Handler]:
        """The client's side of the calls behind the work."""
        return {
            "advertise": self._advertise,
            "share": lambda request, session: _step(protocol.share, request, session),
            "mask": _mask,
            "agree": _agree,
            "unmask": lambda request, session: _step(protocol.unmask, request, session),
        }

    def seal(self, update: Update, session: ClientSession) -> Update:
        """Keep the update; tell that it is there."""
        layout = VectorLayout.of(update)
        vector = layout.vector(update, self.ring)
        ctx, text = session.ctx, layout.to_bytes()
        session.notes |= {"vector": vector, "layout": text}
        name = str(ctx.client)
        receipt = {
            "identity": to_tensor(session.keyring.identity(name).public),
            "layout": to_tensor(text),
            "last": torch.tensor(session.keyring.last(name, task_of(ctx))),
        }
        return Update({"ready": Part(receipt, 0.0)})

    def _advertise(self, request: Request, session: ClientSession) -> Update:
        name, notes = str(session.ctx.client), session.notes
        if "vector" not in notes:
            raise ClientError(f"client {name} has nothing to add up in this round")
        manifest = told(request)
        policy = Policy(
            peers=session.keyring.peers(peer for peer, _ in read_manifest(manifest).cohort),
            min_cohort=self.min_survivors,
            min_survivors=self.min_survivors,
            corrupt=self.corrupt,
            ciphers=frozenset({self.cipher}),
            spent=session.keyring.spent(name),
        )
        content = Content(session.sent, layout_hash(notes["layout"], self.ring), len(notes["vector"]))
        frame, notes["state"] = protocol.advertise(manifest, session.keyring.identity(name), policy, content)
        return _frame(frame)

    def _summed(self, call: Call, requests: Mapping[str, Request], ready: Mapping[str, Update]) -> tuple[Update, int]:
        """The sum of those who have trained and were not lost since, and how many they are.

        Raises:
            RoundVoid: the threshold is missed, or somebody keeps to another protocol.
        """
        try:
            return self._sum(call, requests, ready)
        except (SecureSumError, WireError) as error:
            raise RoundVoid(f"the secure sum was given up: {error}") from error

    def _sum(self, call: Call, requests: Mapping[str, Request], ready: Mapping[str, Update]) -> tuple[Update, int]:
        receipts = {client: Receipt.of(reply) for client, reply in ready.items()}
        first = requests[next(iter(receipts))]
        manifest, layout = self._manifest(receipts, first)
        round = _Round(call, {client: requests[client].ctx for client in receipts}, manifest)
        round.ask("advertise", round.all(manifest.to_bytes()), server.add_advertisement)
        round.ask("share", round.all(server.bundle(round.state)), server.add_shares)
        round.ask("mask", server.inboxes(round.state), server.add_masked)
        round.ask("agree", round.all(server.survivors(round.state)), server.add_consent)
        round.ask("unmask", server.consents(round.state), server.add_unmasking)
        total = finish(round.state)
        for client, what in total.blamed.items():
            refuse(call, "unmask", client, f"it {what}")
        return layout.update(total.values), len(total.survivors)

    def _manifest(self, receipts: Mapping[str, Receipt], first: Request) -> tuple[Manifest, VectorLayout]:
        """What is asked of everybody, and what the vector stands for: the layout that most clients have."""
        graph = choose(len(receipts), self.corrupt, self.dropout)
        text = Counter(receipt.layout for receipt in receipts.values()).most_common(1)[0][0]
        layout = VectorLayout.read(text)
        manifest = Manifest(
            task=task_of(first.ctx),
            round=1 + max(receipt.last for receipt in receipts.values()),
            cohort=tuple((client, receipt.identity) for client, receipt in receipts.items()),
            model=sent_hash(first),
            layout=layout_hash(text, self.ring),
            length=layout.length,
            degree=graph.degree,
            threshold=graph.threshold,
            min_survivors=self.min_survivors,
            bits=self.ring,
            bound=largest_bound(self.ring, first.ctx.cohort),
            cipher=self.cipher,
        )
        return manifest, layout


@dataclass(frozen=True)
class Receipt:
    """What a client tells when it has trained: its public key, the layout of its vector, and its last masked round."""

    identity: bytes
    layout: bytes
    last: int

    @staticmethod
    def of(reply: Update) -> Receipt:
        """From a client's answer to the work.

        Raises:
            WireError: it is another one.
        """
        found = reply.parts["ready"].tree if reply.parts.keys() == {"ready"} else {}
        forms = {name: (leaf.dtype, leaf.dim()) for name, leaf in found.items()}
        if forms != {"identity": (torch.uint8, 1), "layout": (torch.uint8, 1), "last": (torch.int64, 0)}:
            raise WireError("an answer to the work is no receipt of a secure sum")
        return Receipt(to_bytes(found["identity"]), to_bytes(found["layout"]), int(found["last"]))


@dataclass(eq=False)
class _Round:
    """The server's side. `contexts`: of the clients that are left."""

    call: Call
    contexts: Mapping[str, RoundContext]
    manifest: Manifest

    def __post_init__(self) -> None:
        self.state = server.begin(self.manifest)

    def all(self, data: bytes) -> dict[str, bytes]:
        """One message for everybody who is left."""
        return {client: data for client in self.contexts}

    def ask(self, name: str, sent: Mapping[str, bytes], take: Callable[[server.ServerState, bytes], str]) -> None:
        """One call to those who have answered all before; what the protocol refuses is left out."""
        asked = {
            client: Request({"message": to_tensor(data)}, (), self.contexts[client]) for client, data in sent.items()
        }
        left = dict[str, RoundContext]()
        for client, reply in self.call(name, {client: asked[client] for client in self.contexts if client in asked}):
            if not isinstance(reply, Update):
                continue
            try:
                take(self.state, to_bytes(_frame_of(reply)))
            except SecureSumError as error:
                refuse(self.call, name, client, f"its message is refused: {error}")
            else:
                left[client] = self.contexts[client]
            del reply  # before the next one arrives
        self.contexts = left


def task_of(ctx: RoundContext) -> str:
    """Of one run, what rounds are counted in; an evaluation has a key of its own."""
    return f"fedllm {ctx.key.value:016x}"


def layout_hash(layout: bytes, ring: int) -> bytes:
    """Of what each entry of a vector stands for."""
    return digest("layout", layout, str(ring).encode())


def told(request: Request) -> bytes:
    """The message of the protocol that a request carries.

    Raises:
        ClientError: it carries none.
    """
    leaf = request.params.get("message")
    if leaf is None or leaf.dtype != torch.uint8 or leaf.dim() != 1:
        raise ClientError("a request of a secure sum carries no message")
    return to_bytes(leaf)


def _step(step: Callable[[protocol.ClientState, bytes], bytes], request: Request, session: ClientSession) -> Update:
    return _frame(step(_state(session), told(request)))


def _agree(request: Request, session: ClientSession) -> Update:
    """Sign the list of survivors; but no second one of this round that differs."""
    state, ctx = _state(session), session.ctx
    frame = protocol.agree(state, told(request))
    names = sorted(state.manifest.name(place) for place in state.survivors)
    summed = digest("sum", state.manifest.model, json.dumps(names).encode())
    session.keyring.spent(str(ctx.client)).agree(task_of(ctx), ctx.round, summed)
    return _frame(frame)


def _mask(request: Request, session: ClientSession) -> Update:
    """The vector leaves the session: masked in place, it is no longer there."""
    state = _state(session)
    return _frame(protocol.mask(state, told(request), session.notes.pop("vector")))


def _state(session: ClientSession) -> protocol.ClientState:
    state = session.notes.get("state")
    if not isinstance(state, protocol.ClientState):
        raise ClientError(f"client {session.ctx.client} was asked out of turn: it has not sent its keys")
    return state


def _frame(data: bytes) -> Update:
    return Update({"frame": Part({"message": to_tensor(data)}, 0.0)})


def _frame_of(reply: Update) -> Tensor:
    leaf = reply.parts["frame"].tree.get("message") if reply.parts.keys() == {"frame"} else None
    if leaf is None or leaf.dtype != torch.uint8 or leaf.dim() != 1:
        return torch.zeros(0, dtype=torch.uint8)  # which the protocol refuses
    return leaf
