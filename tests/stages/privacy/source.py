"""A source of noise for tests, which keeps what it was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from fedllm.messages.context import ServerContext
from fedllm.messages.update import Part, Update
from fedllm.privacy.noise import NoiseStream, derive
from fedllm.privacy.releases import Kind
from fedllm.rng import Key


@dataclass(eq=False)
class Source:
    """Streams of keys that everybody knows; the same for the same digest."""

    seed: int = 0
    asked: list[tuple[str, str, float, bytes]] = field(default_factory=list)
    ratios: list[tuple[float, float]] = field(default_factory=list)

    def release(self, stage: str, kind: Kind, noise_multiplier: float, digest: bytes) -> NoiseStream:
        self.asked.append((stage, kind, noise_multiplier, digest))
        return NoiseStream(derive(bytes(32), self.seed, digest))

    def stream(self, purpose: str, digest: bytes) -> NoiseStream:
        return NoiseStream(derive(bytes(32), self.seed, purpose, digest))

    def measured(self, noised: float, noise: float, clip: float) -> None:
        self.ratios.append((noised, noise))


def server(source: Source, *, round: int = 0, rounds: int = 1, clients: int = 4, cohort: int | None = None):
    """The server's facts of a round."""
    answered = clients if cohort is None else cohort
    return ServerContext(round, Key(0), answered, clients, rounds, expected=float(clients), noise=source)


def drawn(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Iterator[Update]:
    """Updates of clients: two tensors, one of them non-square, of unequal lengths."""
    generator = torch.Generator().manual_seed(seed)
    for k in range(count):
        leaves = {"a": torch.randn(30, 7, generator=generator), "b": torch.randn(11, generator=generator)}
        yield Update({"delta": Part({n: (leaf * (k + 1) / 10).to(dtype) for n, leaf in leaves.items()}, 1.0)})


def flat(update: Update, *parts: str) -> torch.Tensor:
    """All values, in float64."""
    return torch.cat(
        [leaf.reshape(-1).double() for p in parts or update.parts for leaf in update.parts[p].tree.values()]
    )
