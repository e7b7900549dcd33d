"""The secret noise of the clients of one site: a key that never leaves it, and a stream for each purpose.

stream = NoiseStream(derive(key, round, client, purpose, digest of what is noised))
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedllm.errors import RunError, not_written
from fedllm.files import write_secret_once
from fedllm.messages.context import RoundContext
from fedllm.privacy.noise import KEY_BYTES, NoiseStream, derive, new_key
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
            write_secret_once(path, new_key().hex().encode())
        key = bytes.fromhex(path.read_text().strip())
    except OSError as error:
        raise not_written(path, error, "resume the run") from error
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:  # noise of a shorter key could be guessed
        raise RunError(f"{path} holds no key; bring it back from a copy, or start again with another --out")
    return key


def forget_key(path: Path) -> None:
    """Delete a key, and what a process that died while it made one has left."""
    for each in path.parent.glob(f"{path.name}*"):
        each.unlink(missing_ok=True)


def seeded_key(key: Key) -> bytes:
    """A key from the run's public one, for tests: whoever has the experiment can draw the noise again."""
    return derive(bytes(32), "seeded noise", key.value)
