"""Records: what clients hold, read from packaged data, a file or the hub, under fedllm's own field names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from string import Formatter
from typing import Any, TypeVar

from fedllm.data import sources
from fedllm.data.packaged import handbook
from fedllm.data.record_schema import Record, checked
from fedllm.data.sources import Row
from fedllm.errors import ConfigError, DataError, LocatedRecord, nearest

Held = TypeVar("Held", bound=Sequence[Record])

# Field -> those that it wins over where a record has both: `messages` always, `text` where the objective is `lm`.
WINS: Mapping[str, frozenset[str]] = {
    "messages": frozenset({"prompt", "response"}),
    "text": frozenset({"messages", "prompt", "response"}),
}

__all__ = ["PACKAGED", "Packaged", "Record", "read_records"]


@dataclass(frozen=True)
class Packaged:
    """Data that comes with fedllm: the first facts of the handbook."""

    title: str
    private: int
    shared: int
    test: bool

    def rows(self) -> Iterator[Record]:
        """Its records."""
        yield from handbook.records(private=self.private, shared=self.shared, test=self.test)


PACKAGED: Mapping[str, Packaged] = {
    "handbook": Packaged("four organisations, 24 private facts each and 12 shared, to train on", 24, 12, False),
    "handbook-test": Packaged("the same facts in other words, to test with", 24, 12, True),
    "quickstart": Packaged("the handbook's first 12 private facts each and 6 shared, to train on", 12, 6, False),
    "quickstart-test": Packaged("the same facts in other words, to test with", 12, 6, True),
}


@dataclass(frozen=True)
class FieldMapping:
    """How a field is made from a source's fields: one field as it is, or a template such as "{question}\\n{input}"."""

    name: str
    pieces: tuple[tuple[str, str | None], ...]  # literal text, then a field
    plain: bool

    def value(self, row: Mapping[str, Any], place: str) -> Any:
        """The field's value. What the data holds is never read as a template."""
        parts = [(literal, self._of(row, place, field) if field else "") for literal, field in self.pieces]
        if self.plain:
            return parts[0][1]
        return "".join(f"{literal}{value}" for literal, value in parts)

    def _of(self, row: Mapping[str, Any], place: str, field: str) -> Any:
        if field not in row:
            raise DataError(f"{place} has no field '{field}' to make '{self.name}' from{nearest(field, row)}")
        value = row[field]
        if not self.plain and not isinstance(value, str | int | float):
            raise DataError(f"{place}: '{field}' is not text or a number, as the template of '{self.name}' needs")
        return value


def read_records(source: str, *, fields: Mapping[str, str] | None = None, limit: int | None = None) -> list[Record]:
    """The records of a source, checked.

    Args:
        source: a packaged name (PACKAGED); a file (.jsonl, .json, .csv, each also .gz, or .parquet); or a data set of
            the hub, "org/name" or "org/name/config", with ":split" behind it (train if there is none).
        fields: fedllm's field name -> the source's, or a template in which {name} stands for the source's field.
            Fields that are not named keep their names.
        limit: only the first so many.

    Raises:
        DataError: a missing file, field or row, or a value of the wrong type, with its file and line.
        ConfigError: `fields` or `limit` cannot be right.
        MissingExtra: the source needs a package that is not installed.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"the limit of records is {limit}; it must be 1 or more")
    ways = ways_of(fields)
    return some([record_of(row, place, ways) for place, row in islice(rows_of(source), limit)], source)


def some(records: Held, source: str) -> Held:
    """The records, if there are any."""
    if not records:
        raise DataError(f"{source} holds no records")
    return records


def rows_of(source: str) -> Iterator[Row]:
    """The rows of a source of any kind."""
    if source in PACKAGED:
        return ((f"{source}, record {number}", row) for number, row in enumerate(PACKAGED[source].rows(), 1))
    if sources.is_file(source):
        return sources.file_rows(source)
    if sources.is_hub(source):
        return sources.hub_rows(source)
    known = nearest(source, PACKAGED)
    raise DataError(f"'{source}' is neither packaged data nor a file nor org/name of the hub{known}")


def ways_of(fields: Mapping[str, str] | None) -> list[FieldMapping]:
    """How each field that is named is made."""
    return [_way(name, text) for name, text in (fields or {}).items()]


def record_of(row: Record, place: str, ways: Sequence[FieldMapping]) -> LocatedRecord:
    """A checked record of a row. A field of the source that would win over one that was asked for is left out."""
    made = {way.name: way.value(row, place) for way in ways}
    record = {**row, **made}
    for name, weaker in WINS.items() if made else ():
        if name not in made and not made.keys().isdisjoint(weaker):
            record.pop(name, None)
    return LocatedRecord(checked(record, place), place)


def _way(name: str, text: str) -> FieldMapping:
    if "{" not in text and "}" not in text:
        return FieldMapping(name, (("", text),), plain=True)
    rule = f"'{text}' for field '{name}' is no template"
    try:
        parsed = list(Formatter().parse(text))
    except ValueError as error:
        raise ConfigError(f"{rule} ({error}); write {{{{ and }}}} for braces themselves") from error
    for _, field, form, conversion in parsed:
        if field == "" or form or conversion:
            raise ConfigError(f"{rule}; braces hold the name of a field and nothing else")
    return FieldMapping(name, tuple((literal, field) for literal, field, _, _ in parsed), plain=False)
