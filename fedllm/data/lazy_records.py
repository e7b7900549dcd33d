"""Records that are read when they are asked for, so that memory does not grow with the data.

A file of JSON lines stays where it is and open; memory holds the byte at which each record begins. Any other text file
(.gz, .csv, an array of JSON) is written once, as JSON lines, into an unnamed file in the cache folder, which is gone
when the process ends. Packaged data is small, and the values of Parquet and of the hub may be more than JSON can hold
(dates, bytes): these stay in memory.
"""

from __future__ import annotations

import json
import os
import tempfile
import weakref
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, overload

from fedllm.data import sources
from fedllm.data.record_schema import Record
from fedllm.data.records import FieldMapping, record_of, rows_of, some, ways_of
from fedllm.errors import DataError, LocatedRecord, RunError
from fedllm.files import cache_dir, read_at

OFFSETS = "Q"  # array type of 8 bytes


class JsonlRecords(Sequence[Record]):
    """Records of an open file of JSON lines. `starts`: the byte where the line of each begins, and where the last ends.
    `make`: the record of what a line holds, and of its number in the sequence.

    Threads may share it, and so may processes that are forked.
    """

    def __init__(self, file: IO[bytes], starts: array[int], make: Callable[[Any, int], Record], name: str) -> None:
        self._handle, self._starts, self._make, self._name = file.fileno(), starts, make, name
        self._written = self._stamp()
        weakref.finalize(self, file.close)

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        if isinstance(index, slice):
            return Subset(self, array(OFFSETS, range(len(self))[index]))
        place = range(len(self))[index]
        start, stop = self._starts[place], self._starts[place + 1]
        lines = read_at(self._handle, stop - start, start).splitlines()  # blank ones may follow
        if self._stamp() != self._written:
            raise RunError(f"{self._name} was changed while it was in use; put it back as it was, then resume the run")
        return self._make(json.loads(lines[0]), place)

    def __iter__(self) -> Iterator[Record]:
        return (self[place] for place in range(len(self)))

    def _stamp(self) -> tuple[int, int]:
        status = os.fstat(self._handle)
        return status.st_mtime_ns, status.st_size


class Subset(Sequence[Record]):
    """Some of the records, by their indices in `records`."""

    def __init__(self, records: Sequence[Record], places: array[int]) -> None:
        self._records, self._places = records, places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        if isinstance(index, slice):
            return Subset(self._records, self._places[index])
        return self._records[self._places[index]]

    def __iter__(self) -> Iterator[Record]:
        return (self._records[place] for place in self._places)


def view(records: Sequence[Record], places: Sequence[int]) -> Subset:
    """The records at these places."""
    return Subset(records, array(OFFSETS, places))


def open_records(source: str, *, fields: Mapping[str, str] | None = None) -> Sequence[Record]:
    """The records of a source as `read_records` gives them: all checked now, each read again when it is asked for.

    Raises:
        DataError: a missing file, field or row, or a value of the wrong type, with its file and line.
        ConfigError: `fields` cannot be right.
        MissingExtra: the source needs a package that is not installed.
    """
    ways = ways_of(fields)
    if sources.is_lines(source):
        return some(_in_place(source, ways), source)
    records = (record_of(row, place, ways) for place, row in rows_of(source))
    return some(_unpacked(records, source) if sources.is_text(source) else list(records), source)


def _in_place(source: str, ways: Sequence[FieldMapping]) -> JsonlRecords:
    file, starts, numbers = sources.opened(source), array(OFFSETS), array(OFFSETS)
    with _closed_on_error(file):
        for number, start, (place, row) in sources.numbered_rows(source, file):
            record_of(row, place, ways)
            starts.append(start)
            numbers.append(number)
        starts.append(file.seek(0, os.SEEK_END))
    path = str(Path(source).expanduser())
    return JsonlRecords(file, starts, lambda row, at: record_of(row, f"{path}:{numbers[at]}", ways), source)


def _unpacked(records: Iterator[LocatedRecord], source: str) -> JsonlRecords:
    file, starts = _unnamed(), array(OFFSETS, [0])
    try:
        with _closed_on_error(file):
            for record in records:
                line = json.dumps([record.place, record]).encode() + b"\n"
                file.write(line)
                starts.append(starts[-1] + len(line))
            file.flush()
    except OSError as error:
        reason = f"{source} cannot be unpacked into {cache_dir()} ({error.strerror})"
        raise DataError(f"{reason}; make room there") from error
    return JsonlRecords(file, starts, lambda line, _: LocatedRecord(line[1], line[0]), source)


@contextmanager
def _closed_on_error(file: IO[bytes]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        file.close()
        raise


def _unnamed() -> IO[bytes]:
    """A file without a name in the cache folder, or where temporary files go if that cannot be written to."""
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=cache_dir())
    except OSError:
        return tempfile.TemporaryFile()
