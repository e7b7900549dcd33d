"""The values that move: what a client is told, what it answers, and where it stands."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch

from fedllm.packing import DENSE, Packing
from fedllm.places import Form
from fedllm.ranges import require
from fedllm.rng import Key
from fedllm.shift import Shift
from fedllm.tree import Tree


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
class Ctx:
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


@dataclass(frozen=True)
class Local:
    """What a stage's client half may know. Never leaves the client; no facts in `receive`.

    `fresh` holds the initial value of every leaf that the client trains, the same on all clients.
    """

    ctx: Ctx
    facts: Mapping[str, float] = field(default_factory=dict)
    fresh: Mapping[str, torch.Tensor] = field(default_factory=dict)


Asked = Mapping[str, Mapping[str, Form]]  # by part, of each leaf its type and shape


def not_known(call: str) -> Asked | None:
    """Nobody has worked out what a reply may hold."""
    return None


@dataclass(frozen=True)
class Request:
    """Server to client: parameters, one extra tree per stage, and the facts of the step.

    shift: what the client has missed of what was added to the frozen weights.
    asks: what the reply to a call may hold; for the server's own use, which is not sent.
    """

    params: Tree
    extras: tuple[Tree, ...]
    ctx: Ctx
    shift: Shift = Shift()
    asks: Callable[[str], Asked | None] = field(default=not_known, compare=False, repr=False)


@dataclass(frozen=True)
class Part:
    """One named tree of an update.

    weight None: the WEIGH stage decides. w > 0: its own weight. 0: a plain sum, never divided.
    From the WEIGH stage on the tree is weight * values, until its `decode` divides by the sum.
    exact: values that no stage may round; a note for the client's own stages, which is not sent.
    answered: on the server, behind the weigher's `decode`: the sum of the weights over what it was divided by. Below 1
    where the denominator counts clients that were lost. What is no difference from what was sent needs it: the old
    value stands for the rest, 1 - answered.
    """

    tree: Tree
    weight: float | None = None
    packing: Packing = DENSE
    exact: bool = False
    answered: float = 1.0


@dataclass(frozen=True)
class Update:
    """The only thing that a client sends: "delta" (local - global: ascent), "metrics", and what stages add."""

    parts: Mapping[str, Part]

    def having(self, name: str, part: Part) -> Update:
        """This update with one part set."""
        return replace(self, parts={**self.parts, name: part})

    def without(self, name: str) -> Update:
        """This update with one part taken out."""
        return replace(self, parts={key: part for key, part in self.parts.items() if key != name})


@dataclass(frozen=True)
class Failure:
    """A client that did not answer, and why, in one sentence."""

    client: str
    round: int
    reason: str
