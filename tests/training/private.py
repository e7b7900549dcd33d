"""Secret noise for tests: a client that has a source of it, from a fixed key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedllm.messages.context import RoundContext
from fedllm.models.batch import Example
from fedllm.models.loaded_model import LoadedModel
from fedllm.privacy.noise import NoiseStream, derive
from fedllm.training.base import ClientJob
from tests.training.test_sgd import job

SECRET = bytes(range(32))


@dataclass(frozen=True)
class Noise:
    """The streams of one site."""

    ctx: RoundContext
    key: bytes = SECRET

    def stream(self, purpose: str, digest: bytes) -> NoiseStream:
        return NoiseStream(derive(self.key, self.ctx.round, str(self.ctx.client), purpose, digest))


def private_job(
    model: LoadedModel, client: str, *, examples: Sequence[Example] | None = None, key: bytes = SECRET
) -> ClientJob:
    found = job(model, client, examples=examples)
    return replace(found, noise=Noise(found.ctx, key))
