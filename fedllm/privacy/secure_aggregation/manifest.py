"""The manifest of a round: what the server says before anyone sends anything, and what everything after is bound to."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from fedllm.privacy.secure_aggregation.encoding import Reader, number, text
from fedllm.privacy.secure_aggregation.faults import ManifestError, MessageError
from fedllm.privacy.secure_aggregation.primitives import AES, CIPHERS, KEY, digest
from fedllm.privacy.secure_aggregation.rings import RINGS, largest_bound

VERSION = 1
MOST_CLIENTS = 10_000
MOST_NAME = 200  # bytes of a task's or a client's name
MOST_ENTRIES = 2**40
HEAD = b"fedllm-manifest\0"


@dataclass(frozen=True)
class Manifest:
    """The conditions of one secure sum.

    Args:
        task: what is summed, such as a run's name and "train" or "evaluate"; rounds are counted within it.
        round: greater than every earlier one of the task.
        cohort: (name, Ed25519 public key) of each client; a client's place in it is its number.
        model: hash of the parameters that the clients were sent.
        layout: hash of what each entry of the vector stands for, and of how it is encoded: scale, clipping, noise.
        length: entries of the vector.
        degree: neighbours of a client, k: even, or the size of the cohort less 1.
        threshold: shares that give a secret back, t.
        min_survivors: clients that a sum must be of.
        bits: of the ring: 16, 20 or 32.
        bound: largest magnitude of an integer that one client may send.
        weight_cap: largest weight of one client.
        cipher: of the masks, "aes-128-ctr" or "chacha20".
        version: of the protocol.

    Raises:
        ManifestError: conditions under which no sum is right: an overflow, a threshold above the degree, a repeated
            name or key.
    """

    task: str
    round: int
    cohort: tuple[tuple[str, bytes], ...]
    model: bytes
    layout: bytes
    length: int
    degree: int
    threshold: int
    min_survivors: int
    bits: int
    bound: int
    weight_cap: int = 1
    cipher: str = AES
    version: int = VERSION

    def __post_init__(self) -> None:
        for holds, sentence in _conditions(self):
            if not holds:
                raise ManifestError(f"round {self.round} of {self.task!r}: {sentence}")

    @cached_property
    def hash(self) -> bytes:
        """What every key, share and signature of the round is bound to."""
        return digest("manifest", self.to_bytes())

    def name(self, client: int) -> str:
        """The name of a client by its place in the cohort."""
        return self.cohort[client][0]

    def place(self, name: str) -> int:
        """The place of a client in the cohort.

        Raises:
            ManifestError: it is not in it.
        """
        for place, (other, _) in enumerate(self.cohort):
            if other == name:
                return place
        raise ManifestError(f"round {self.round} of {self.task!r} has no client {name!r}")

    def to_bytes(self) -> bytes:
        """As it is sent and hashed."""
        clients = b"".join(text(name) + key for name, key in self.cohort)
        numbers = (self.length, self.degree, self.threshold, self.min_survivors, self.bits, self.bound, self.weight_cap)
        fields = (HEAD, number(self.version, 2), text(self.task), number(self.round, 8), self.model, self.layout)
        tail = (text(self.cipher), number(len(self.cohort), 2), clients)
        return b"".join((*fields, *(number(value, 8) for value in numbers), *tail))


def _conditions(manifest: Manifest) -> tuple[tuple[bool, str], ...]:
    """What must hold of a manifest, each with what is wrong where it does not."""
    n, k, t = len(manifest.cohort), manifest.degree, manifest.threshold
    names = [name for name, _ in manifest.cohort]
    keys = [key for _, key in manifest.cohort]
    most = largest_bound(manifest.bits, max(n, 1)) if manifest.bits in RINGS else 0
    return (
        (manifest.version == VERSION, f"its protocol is version {manifest.version}; this is version {VERSION}"),
        (0 <= manifest.round < 2**63, "a round is a number from 0 on"),
        (2 <= n <= MOST_CLIENTS, f"its cohort has {n} clients; 2 to {MOST_CLIENTS:,} can take part"),
        (
            all(name and len(name.encode()) <= MOST_NAME for name in (manifest.task, *names)),
            "a name is too long or empty",
        ),
        (len(set(names)) == n, "two clients have the same name"),
        (len(set(keys)) == n, "two clients have the same identity key"),
        (
            all(len(item) == KEY for item in (*keys, manifest.model, manifest.layout)),
            f"keys and hashes have {KEY} bytes",
        ),
        (1 <= manifest.length <= MOST_ENTRIES, f"a vector of {manifest.length:,} entries cannot be summed"),
        (k == n - 1 or (0 < k < n - 1 and k % 2 == 0), f"a degree of {k} with {n} clients; it is even, or {n - 1}"),
        (1 <= t <= k, f"a threshold of {t} with {k} neighbours; it must be 1 to {k}"),
        (2 <= manifest.min_survivors <= n, f"a sum of {manifest.min_survivors} clients; it must be of 2 to {n}"),
        (manifest.bits in RINGS, f"a ring of 2^{manifest.bits}; there are 2^16, 2^20 and 2^32"),
        (
            1 <= manifest.bound <= most,
            f"{n} clients with integers up to {manifest.bound} overflow the ring 2^{manifest.bits}; at most {most} fit",
        ),
        (
            1 <= manifest.weight_cap <= manifest.bound,
            f"a weight of {manifest.weight_cap} does not fit under the bound {manifest.bound}",
        ),
        (manifest.cipher in CIPHERS, f"masks by {manifest.cipher!r}; there are {' and '.join(CIPHERS)}"),
    )


def read_manifest(data: bytes) -> Manifest:
    """A manifest from its bytes.

    Raises:
        MessageError: the bytes are no manifest.
        ManifestError: it has conditions under which no sum is right.
    """
    reader = Reader(data, "a manifest")
    if reader.take(len(HEAD)) != HEAD:
        raise MessageError("a manifest does not begin like one")
    version, task, round = reader.number(2), reader.text(MOST_NAME), reader.number(8)
    model, layout = reader.bytes(KEY), reader.bytes(KEY)
    length, degree, threshold, survivors, bits, bound, weight_cap = (reader.number(8) for _ in range(7))
    cipher, count = reader.text(MOST_NAME), reader.number(2)
    cohort = tuple((reader.text(MOST_NAME), reader.bytes(KEY)) for _ in range(count))
    reader.end()
    return Manifest(
        *(task, round, cohort, model, layout, length, degree, threshold, survivors, bits, bound, weight_cap),
        *(cipher, version),
    )
