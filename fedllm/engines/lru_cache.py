"""A least-recently-used cache that is bounded by the size of its values, such as tokens.

`functools.lru_cache` bounds the number of entries. Clients' examples differ in size, so that a number of entries is no
bound on memory.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Generic, TypeVar

Name = TypeVar("Name", bound=Hashable)
Value = TypeVar("Value")


class SizedLRUCache(Generic[Name, Value]):
    """`make(name)`, or what it made before, if that is among the last values whose sizes add up to `room`.

    The newest value is always kept. Threads may share it; two that ask for the same new name at once both make it.
    """

    def __init__(self, make: Callable[[Name], Value], size: Callable[[Value], int], room: int) -> None:
        self._make, self._size, self._room = make, size, room
        self._held: OrderedDict[Name, Value] = OrderedDict()
        self._taken = 0
        self._lock = Lock()

    def __call__(self, name: Name) -> Value:
        """The value of a name."""
        with self._lock:
            if name in self._held:
                self._held.move_to_end(name)
                return self._held[name]
        value = self._make(name)
        with self._lock:
            if name not in self._held:
                self._held[name] = value
                self._taken += self._size(value)
            while self._taken > self._room and len(self._held) > 1:
                self._taken -= self._size(self._held.popitem(last=False)[1])
        return value
