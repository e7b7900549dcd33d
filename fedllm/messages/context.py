"""What is known at one step of a round: public facts, and those of one client."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from fedllm.errors import require
from fedllm.privacy.noise import NoiseStream
from fedllm.privacy.releases import Kind
from fedllm.rng import Key


@dataclass(frozen=True)
class Profile:
    """What a client's device can do; what is None is as for everybody.

    Args:
        rank: of the adapter. device: the name of its class. steps, batch_size, lr: of the work; `steps` stands for the
            work's `epochs`, too. bandwidth: bytes that it may send in a round, of values.
    """

    rank: int | None = None
    device: str = "default"
    steps: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    bandwidth: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("rank", 1), ("steps", 0), ("batch_size", 1), ("bandwidth", 1)):
            value = self.__dict__[name]
            require(value is None or value >= least, self, field=name, value=value, allowed=f"{least} or more")
        lr = self.lr
        require(lr is None or 0 <= lr < math.inf, self, field="lr", value=lr, allowed="0 or more and finite")

    def over(self, other: Profile) -> Profile:
        """This profile; what it leaves open is as in the other."""
        return replace(other, **{name: value for name, value in vars(self).items() if value is not None})


@dataclass(frozen=True)
class RoundContext:
    """Public facts of one step of one round: no arrays, no handles.

    Args:
        round: index of the round, from 0; `rounds`: how many the run has.
        key: the run's public key. cohort: clients drawn; population: clients there are.
        client: None on the server. slot: the client's place in the cohort.
    """

    round: int
    key: Key
    cohort: int
    population: int
    rounds: int = 1
    client: str | None = None
    slot: int = 0
    profile: Profile = Profile()

    def rng(self, purpose: str) -> torch.Generator:
        """The generator of (run, round, client, purpose): the only source of reproducible draws."""
        return self.key.fold(self.round, self.client or "", purpose).generator()


class ClientNoise(Protocol):
    """Where one client draws secret noise in one round. The key is the client's own and never leaves it."""

    def stream(self, purpose: str, digest: bytes) -> NoiseStream:
        """The noise for one purpose. `digest`: of what the noise is added to, or of what that follows from: the same
        input is given the same noise again, as after a crash, and any other input is given fresh noise."""
        ...


class ServerNoise(Protocol):
    """Where the server draws secret noise in one round, and where it accounts for what it gives out."""

    def release(self, stage: str, kind: Kind, noise_multiplier: float, digest: bytes) -> NoiseStream:
        """The noise for one noised sum, once the ledger has it on the disk, with the scheme of the sampler that ran.
        `digest`: of the sum before the noise."""
        ...

    def measured(self, noised: float, noise: float, clip: float) -> None:
        """For the log: the 2-norm of the noised sum, the root of the expected square of that of its noise, and the
        clip that the clients were given."""
        ...


@dataclass(frozen=True)
class ServerContext(RoundContext):
    """The facts of a round on the server, with what nobody else has. Never sent.

    Args:
        expected: the expected size of a cohort, which does not depend on who was drawn.
        noise: where secret noise comes from; None where nothing is released, as for an evaluation.
    """

    expected: float = 0.0
    noise: ServerNoise | None = None


@dataclass(frozen=True)
class ClientContext:
    """What a stage's client half may know. Never leaves the client; no facts in `receive`.

    `initial_params` holds the initial value of every tensor that the client trains, the same on all clients. `noise`:
    where the client's secret noise comes from; None in a dry run.
    """

    ctx: RoundContext
    facts: Mapping[str, float] = field(default_factory=dict)
    initial_params: Mapping[str, torch.Tensor] = field(default_factory=dict)
    noise: ClientNoise | None = None
