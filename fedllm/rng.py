"""Keyed randomness: a draw depends on its key alone, never on the order of draws or the engine.

A key is folded with names (round, client, purpose) by BLAKE2b; the generator of a key is
always the same. Secret draws (noise of differential privacy, masks) do not come from here.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Key:
    """A public random key of 64 bits."""

    value: int

    def fold(self, *names: str | int) -> Key:
        """The key of a sub-draw. Names of different types or splits are never the same text."""
        # "\0" parts the names and is doubled inside of one, so the text can be read in one way only.
        listed = (f"{type(name).__name__}:{name}".replace("\0", "\0\0") for name in (self.value, *names))
        text = "\0".join(listed)
        return Key(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big"))

    def generator(self, device: str = "cpu") -> torch.Generator:
        """A fresh generator, seeded by the key."""
        # manual_seed of the CPU generator keeps 32 bits; the fold above spreads all 64 over them.
        return torch.Generator(device).manual_seed(self.value & 0x7FFF_FFFF_FFFF_FFFF)

    def seed32(self) -> int:
        """A seed for libraries that take 32 bits."""
        return self.value & 0xFFFF_FFFF
