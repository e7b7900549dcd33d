"""A sum of ciphertexts: the server adds up what it cannot read, and one client reads the total for it.

    client     E(round(x / g) g)          g: a grid, coarse against the error of the encryption, fine against the values
    server     E(x_1) + ... + E(x_n)      it holds no key
    a client   the total, in the clear, if it is of enough clients

All clients share one secret key, as in FedML-HE (Jin et al. 2023, arXiv 2303.10837). So this hides updates from a
server that keeps to the protocol. A server and one client that work together read every update, and a server that
cheats may hand a client a single ciphertext in place of a sum, added to itself until it looks like one. A secure
sum (`secure_sum`) is not open to either.

The sum is exact: clients round to the grid, and so does whoever reads the total. Figures, weights and what is exact
travel as digits. What the stage `selective_encryption` puts into the part `clear` is not encrypted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedllm.aggregators import ckks
from fedllm.aggregators.base import Aggregator, ClientSession, Handler
from fedllm.aggregators.homomorphic_layout import HomomorphicLayout, Scale
from fedllm.aggregators.keyring import Keyring
from fedllm.errors import ClientError, RoundVoid, RunError, WireError, not_written, require
from fedllm.files import write_secret_once
from fedllm.messages.call import Call, refuse
from fedllm.messages.traits import Fact, Traits
from fedllm.messages.update import CLEAR, Part, Request, Update
from fedllm.tensors import tree
from fedllm.tensors.byte_tensors import to_bytes, to_tensor

SECRET = "ckks.secret"


@dataclass(frozen=True)
class HomomorphicSum(Aggregator):
    """The sum of encrypted updates, with TenSEAL (`fedllm[homomorphic]`).

    Args:
        bound: the largest entry of a client's weighted update, in magnitude. The grid is bound x clients x 2^-37.
        min_clients: a client reads no total of fewer clients.
    """

    bound: float = 64.0
    min_clients: int = 3

    traits = Traits(loses=Fact.ANY_RANK)

    def __post_init__(self) -> None:
        require(0 < self.bound < math.inf, self, field="bound", value=self.bound, allowed="above 0 and finite")
        require(self.min_clients >= 2, self, field="min_clients", value=self.min_clients, allowed="2 or more")

    def handlers(self) -> Mapping[str, Handler]:
        """The client that reads the total."""
        return {"decrypt": self._decrypt}

    def seal(self, update: Update, session: ClientSession) -> Update:
        """Encrypt all but the parts that are in the clear."""
        scale = Scale(self.bound, session.ctx.cohort)
        layout = HomomorphicLayout.of(update)
        values = layout.values(update, scale)
        sent = {
            f"{number:06d}": to_tensor(data) for number, data in enumerate(ckks.encrypt(_key(session.keyring), values))
        }
        clear = {name: part for name, part in update.parts.items() if name == CLEAR}
        about = {"layout": to_tensor(layout.to_bytes())}
        return Update({"cipher": Part(sent, 0.0), "about": Part(about, 0.0), **clear})

    def reduce(self, call: Call, requests: Mapping[str, Request], name: str = "work") -> Update:
        """Two calls: the work, and one client that reads the total.

        Raises:
            RoundVoid: there is no total, or nobody reads it.
        """
        found = _Sum(Scale(self.bound, next(iter(requests.values())).ctx.cohort))
        for client, reply in call(name, requests):
            if isinstance(reply, Update):
                try:
                    found.add(client, reply)
                except WireError as error:
                    refuse(call, name, client, f"its reply is refused: {error}")
            del reply  # before the next one arrives
        if not found.clients:
            return Update({})
        values = self._read(call, requests, found)
        try:
            total = found.layout.update(values, found.scale)
        except WireError as error:
            raise RoundVoid(f"the homomorphic sum was given up: {error}") from error
        return Update({**total.parts, **({CLEAR: Part(found.clear, 0.0)} if found.clear else {})})

    def _read(self, call: Call, requests: Mapping[str, Request], found: _Sum) -> np.ndarray:
        """The total in the clear, by the first client that answers."""
        sent: dict[str, Tensor] = {f"{n:06d}": to_tensor(bytes(one.serialize())) for n, one in enumerate(found.totals)}
        sent["length"] = torch.tensor(found.length)
        for client in found.clients:
            for _, reply in call("decrypt", {client: Request(sent, (), requests[client].ctx)}):
                leaf = reply.parts["total"].tree.get("values") if isinstance(reply, Update) else None
                if leaf is not None and leaf.dtype == torch.float64 and leaf.shape == (found.length,):
                    return leaf.numpy()
        raise RoundVoid("no client has read the total of the homomorphic sum")

    def _decrypt(self, request: Request, session: ClientSession) -> Update:
        """The client's side: the total, if it is of enough clients.

        Raises:
            ClientError: it is of too few, or none.
        """
        sent, length = _ciphertexts(request.params)
        try:
            values = ckks.decrypt(_key(session.keyring), sent, length)
        except (WireError, ValueError, RuntimeError) as error:
            raise ClientError(f"what it was asked to read is no sum: {type(error).__name__}") from error
        clients = round(float(values[0])) if len(values) else 0
        if clients < self.min_clients:
            raise ClientError(
                f"it reads no total of {clients} clients; homomorphic_sum.min_clients is {self.min_clients}"
            )
        return Update({"total": Part({"values": torch.from_numpy(values)}, 0.0)})


class _Sum:
    """What the server has added up."""

    def __init__(self, scale: Scale) -> None:
        self.scale = scale
        self.totals: list[Any] = []
        self.text = b""
        self.layout = HomomorphicLayout(())
        self.clear: dict[str, Tensor] = {}
        self.clients: list[str] = []

    @property
    def length(self) -> int:
        """Slots of the vector."""
        return self.layout.length(self.scale)

    def add(self, client: str, reply: Update) -> None:
        """One client's ciphertexts.

        Raises:
            WireError: they are none, or do not fit those before them.
        """
        if not reply.parts.keys() - {CLEAR} == {"cipher", "about"}:
            raise WireError("it has other parts than ciphertexts")
        text = to_bytes(reply.parts["about"].tree.get("layout"))
        if self.clients and text != self.text:
            raise WireError("its tensors are not those of the clients before it")
        layout = HomomorphicLayout.read(text)
        sent = reply.parts["cipher"].tree
        length = layout.length(self.scale)
        if len(sent) != -(-length // ckks.SLOTS):
            raise WireError(f"{len(sent)} ciphertexts for {length} values")
        clear = reply.parts[CLEAR].tree if CLEAR in reply.parts else {}
        if self.clients and tree.forms(clear) != tree.forms(self.clear):
            raise WireError("its tensors in the clear are not those of the clients before it")
        totals = ckks.added(self.totals if self.clients else None, [to_bytes(sent[name]) for name in sorted(sent)])
        if self.clients and clear:
            tree.add_(self.clear, clear)
        elif not self.clients:
            self.text, self.layout, self.clear = text, layout, dict(clear)
        self.totals = totals
        self.clients.append(client)


def _ciphertexts(params: Mapping[str, Tensor]) -> tuple[list[bytes], int]:
    """Of a request to read a total.

    Raises:
        ClientError: it is none.
    """
    length = params.get("length")
    try:
        sent = [to_bytes(params[name]) for name in sorted(params) if name != "length"]
        if length is None or length.dtype != torch.int64 or length.dim():
            raise WireError("no length")
        if len(sent) != -(-int(length) // ckks.SLOTS):
            raise WireError("another number of ciphertexts")
    except WireError as error:
        raise ClientError(f"what it was asked to read is no sum: {error}") from error
    return sent, int(length)


def _key(keyring: Keyring) -> Any:
    """The secret key that all clients share: of their folder, or of this process. The first who needs it makes it.

    Raises:
        RunError: its file cannot be used, or others can read it.
    """
    if keyring.folder is None:
        if SECRET not in keyring.shared:
            keyring.shared[SECRET] = ckks.new_secret()
        return ckks.secret(keyring.shared[SECRET])
    path = keyring.folder / SECRET
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            write_secret_once(path, ckks.new_secret())
        if path.stat().st_mode & 0o077:
            raise RunError(f"{path} is a secret key that others can read; run: chmod 600 {path}")
        return ckks.secret(path.read_bytes())
    except OSError as error:
        raise not_written(path, error) from error
