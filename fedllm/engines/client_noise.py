"""The secret noise of the clients of one site: a key that never leaves it, and a stream for each purpose.

stream = NoiseStream(derive(key, round, client, purpose, digest of what is noised))
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from fedllm.errors import RunError, not_written
from fedllm.messages.context import RoundContext
from fedllm.privacy.noise import NoiseStream, derive, new_key
from fedllm.rng import Key

FILE = "noise.key"


@dataclass(frozen=True, eq=False)
class RoundStreams:
    """Where one client draws secret noise in one round."""

    key: bytes
    ctx: RoundContext

    def stream(self, purpose: str, digest: bytes) -> NoiseStream:
        """The same for the same input, and fresh for any other."""
        return NoiseStream(derive(self.key, "client", self.ctx.round, str(self.ctx.client), purpose, digest))


def key_file(path: Path) -> bytes:
    """The key in a file; a new one of the operating system, readable by the owner alone, if there is no file yet.

    Raises:
        RunError: the file cannot be read or written, or is no key.
    """
    try:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(new_key().hex())
                file.flush()
                os.fsync(file.fileno())
        return bytes.fromhex(path.read_text().strip())
    except OSError as error:
        raise not_written(path, error, "resume the run") from error
    except ValueError as error:
        raise RunError(f"{path} holds no key; bring it back from a copy, or start again with another --out") from error


def seeded_key(key: Key) -> bytes:
    """A key from the run's public one, for tests: whoever has the experiment can draw the noise again."""
    return derive(bytes(32), "seeded noise", key.value)
