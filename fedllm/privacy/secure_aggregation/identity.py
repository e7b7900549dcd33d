"""Who a client is: an Ed25519 key that is made once and that every peer has pinned.

An identity file holds the secret key in hex and belongs to its owner alone (mode 0600). A peers file holds a name and a
public key in hex on each line; lines that begin with # are comments.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedllm.privacy.secure_aggregation.faults import IdentityError
from fedllm.privacy.secure_aggregation.primitives import KEY, random_bytes, sign, signing_public

HEX_KEY = re.compile(rf"[0-9a-f]{{{2 * KEY}}}")
MOST_BYTES = 1 << 22  # of a peers file


@dataclass(frozen=True)
class Identity:
    """A client's name and its secret key, which no text of it shows."""

    name: str
    secret: bytes = field(repr=False)

    @property
    def public(self) -> bytes:
        """What peers pin."""
        return signing_public(self.secret)

    def sign(self, message: bytes) -> bytes:
        """An Ed25519 signature."""
        return sign(self.secret, message)


def new_identity(name: str) -> Identity:
    """An identity with a new key."""
    return Identity(name, random_bytes())


def save_identity(path: Path, identity: Identity) -> None:
    """Write the secret key to a new file that its owner alone can read.

    Raises:
        IdentityError: there is a file already; a key that peers have pinned is not overwritten.
    """
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise IdentityError(f"{path} exists; a key is not overwritten, so move it away to make a new one") from error
    with os.fdopen(handle, "w") as file:
        file.write(identity.secret.hex() + "\n")
        file.flush()
        os.fsync(handle)


def load_identity(path: Path, name: str) -> Identity:
    """The identity of a file.

    Raises:
        IdentityError: it cannot be read, is no key, is a link, or others can read it.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as error:
        raise IdentityError(
            f"the identity file {path} cannot be opened ({error.strerror}); make one, or name it"
        ) from error
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or found.st_mode & 0o077 or found.st_uid != os.geteuid():
            raise IdentityError(
                f"the identity file {path} is not its owner's alone (mode {stat.S_IMODE(found.st_mode):04o}); "
                f"run: chmod 600 {path}"
            )
        words = os.read(handle, 4 * KEY).decode("ascii", "replace").strip()
    finally:
        os.close(handle)
    if not HEX_KEY.fullmatch(words):
        raise IdentityError(f"the identity file {path} does not hold a key of {KEY} bytes in hex")
    return Identity(name, bytes.fromhex(words))


def save_peers(path: Path, peers: Mapping[str, bytes]) -> None:
    """Write the pinned public keys."""
    path.write_text("".join(f"{name} {key.hex()}\n" for name, key in peers.items()), "utf-8")


def load_peers(path: Path) -> dict[str, bytes]:
    """The pinned public keys of a file: name -> key.

    Raises:
        IdentityError: a line is no name and key, or a name or a key stands in it twice.
    """
    try:
        words = path.read_bytes()[:MOST_BYTES].decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise IdentityError(f"the file of pinned peers {path} cannot be read ({error})") from error
    peers: dict[str, bytes] = {}
    for place, line in enumerate(words.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, key = line.strip().rpartition(" ")
        if not name or not HEX_KEY.fullmatch(key):
            raise IdentityError(f"{path}:{place} is not a name and a key of {KEY} bytes in hex")
        if name in peers or bytes.fromhex(key) in peers.values():
            raise IdentityError(f"{path}:{place} has a name or a key that an earlier line has; each peer has its own")
        peers[name] = bytes.fromhex(key)
    return peers
