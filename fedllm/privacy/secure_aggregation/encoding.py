"""Reading and writing bytes field by field, big-endian; whatever does not fit exactly is refused."""

from __future__ import annotations

from fedllm.privacy.secure_aggregation.faults import MessageError


def number(value: int, size: int) -> bytes:
    """A number from 0 on in `size` bytes."""
    return value.to_bytes(size, "big")


def text(value: str) -> bytes:
    """A text behind its length in two bytes."""
    data = value.encode()
    return number(len(data), 2) + data


class Reader:
    """Takes fields off the front of bytes.

    Raises:
        MessageError: from every method, where the bytes are too few, too many or not what the field is.
    """

    def __init__(self, data: bytes | memoryview, what: str) -> None:
        self._data, self._place, self._what = memoryview(data), 0, what

    def take(self, count: int) -> memoryview:
        """The next `count` bytes."""
        end = self._place + count
        if end > len(self._data):
            raise MessageError(f"{self._what} ends after {len(self._data):,} bytes; at least {end:,} belong to it")
        self._place, start = end, self._place
        return self._data[start:end]

    def bytes(self, count: int) -> bytes:
        """The next `count` bytes, as a copy."""
        return bytes(self.take(count))

    def number(self, size: int) -> int:
        """A number of `size` bytes."""
        return int.from_bytes(self.take(size), "big")

    def text(self, most: int) -> str:
        """A text of 1 to `most` bytes that can be printed."""
        count = self.number(2)
        if not 1 <= count <= most:
            raise MessageError(f"{self._what} has a text of {count} bytes; 1 to {most} are allowed")
        try:
            found = self.bytes(count).decode()
        except UnicodeDecodeError as error:
            raise MessageError(f"{self._what} has a text that is not UTF-8") from error
        if not found.isprintable():
            raise MessageError(f"{self._what} has a text that cannot be printed")
        return found

    def end(self) -> None:
        """Nothing is left."""
        if self._place != len(self._data):
            raise MessageError(f"{self._what} has {len(self._data) - self._place:,} bytes after its end")
