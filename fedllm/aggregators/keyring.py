"""The identities of the clients of a site, the keys that they have pinned, and where they mark rounds as masked.

    FOLDER/NAME.key     the secret key, which its owner alone can read        FOLDER/NAME.pub     what peers pin
    FOLDER/NAME.spent/  the rounds in which the client has masked

In a simulation all sites share a folder, and each makes the keys of its clients when they are first asked. Without a
folder everything stays in this process.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from fedllm.errors import RunError, not_written
from fedllm.files import write_durably
from fedllm.privacy.secure_aggregation.identity import Identity, load_identity, new_identity, save_identity
from fedllm.privacy.secure_aggregation.spent import SpentInMemory, SpentOnDisk

FOLDER = "identities"


@dataclass(frozen=True, eq=False)
class Keyring:
    """One for each site. Nothing in it is ever sent but public keys."""

    folder: Path | None = None
    identities: dict[str, Identity] = field(default_factory=dict, repr=False)
    marks: dict[str, SpentInMemory] = field(default_factory=dict)
    shared: dict[str, bytes] = field(default_factory=dict, repr=False)  # keys that all clients have

    def check(self) -> None:
        """Look at the key files that are there.

        Raises:
            RunError: one of them is no key, or others than its owner can read it.
        """
        for path in sorted(self.folder.glob("*.key")) if self.folder is not None else ():
            self._loaded(path, path.stem)

    def identity(self, client: str) -> Identity:
        """The client's own; a new one if it has none yet.

        Raises:
            RunError: its file cannot be written, is no key, or others can read it.
        """
        if client not in self.identities:
            self.identities[client] = self._from_file(client)
        return self.identities[client]

    def _from_file(self, client: str) -> Identity:
        if self.folder is None:
            return new_identity(client)
        path = self.folder / f"{client}.key"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if path.is_file():
                return self._loaded(path, client)
            made = new_identity(client)
            save_identity(path, made)
            write_durably(path.with_suffix(".pub"), (made.public.hex() + "\n").encode())
        except OSError as error:
            raise not_written(path, error) from error
        return made

    def _loaded(self, path: Path, client: str) -> Identity:
        try:
            return load_identity(path, client)
        except ValueError as error:
            raise RunError(str(error)) from error

    def peers(self, clients: Iterable[str]) -> dict[str, bytes]:
        """The pinned keys of some clients; those that nobody has pinned are missing."""
        if self.folder is None:
            return {name: self.identities[name].public for name in clients if name in self.identities}
        paths = {name: self.folder / f"{name}.pub" for name in clients}
        return {name: bytes.fromhex(path.read_text().strip()) for name, path in paths.items() if path.is_file()}

    def spent(self, client: str) -> SpentInMemory | SpentOnDisk:
        """Where a client marks the rounds in which it has masked."""
        if self.folder is None:
            return self.marks.setdefault(client, SpentInMemory())
        return SpentOnDisk(self.folder / f"{client}.spent")

    def last(self, client: str, task: str) -> int:
        """The last round of a task in which a client has masked; -1: none."""
        found = self.spent(client)
        return found.last(task) if isinstance(found, SpentOnDisk) else found.rounds.get(task, -1)
