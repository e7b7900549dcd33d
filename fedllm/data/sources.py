"""Sources: rows of files and of the hub, each with the place where it stands.

Files end in .jsonl or .json (one object a line, or one array of objects), .csv, all three also with .gz, or .parquet.
JSON and CSV are read with the standard library alone; pyarrow and `datasets` are imported only where they are needed.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TextIO

from fedllm.data import hub_worker
from fedllm.errors import DataError, MissingExtra, nearest

Row = tuple[str, dict[str, Any]]  # the place ("notes/train.jsonl:3"), and what stands there
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # half of a pair, as JSON writes it
LONGEST_CELL = 2**31 - 1  # letters of a cell of CSV: the most that the library can be told on every system

HUB = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(:(?P<split>[\w\[\]%+:-]+))?")


def is_file(source: str) -> bool:
    """True if a source is meant as a file: it ends like one, or it is there."""
    return _suffix(source) in READERS or Path(source).expanduser().exists()


def file_rows(source: str) -> Iterator[Row]:
    """The rows of a file, one at a time.

    Raises:
        DataError: the file is not there, of no known kind, damaged, or holds something else than rows.
        MissingExtra: pyarrow is not installed.
    """
    path = Path(source).expanduser()
    if not path.exists():
        raise DataError(f"there is no file {path}{_nearest_file(path)}")
    if _suffix(source) not in READERS or path.is_dir():
        raise DataError(f"{path} is not a file that ends in {', '.join(sorted(READERS))} (all but .parquet also .gz)")
    with _readable(path):
        yield from READERS[_suffix(source)](path)


def is_lines(source: str) -> bool:
    """True if a source is a file of JSON lines as they are: not packed, no array."""
    path = Path(source).expanduser()
    if _suffix(source) not in (".jsonl", ".json") or path.suffix.lower() == ".gz" or not path.is_file():
        return False
    with _readable(path):
        return _suffix(source) == ".jsonl" or not _is_array(path)


def is_text(source: str) -> bool:
    """True if a source is a file of text: what it holds can be written as JSON."""
    return is_file(source) and _suffix(source) != ".parquet"


def opened(source: str) -> IO[bytes]:
    """A file, to be read as bytes.

    Raises:
        DataError: it cannot be read.
    """
    path = Path(source).expanduser()
    with _readable(path):
        return path.open("rb")


def numbered_rows(source: str, file: Iterable[bytes]) -> Iterator[tuple[int, int, Row]]:
    """The rows of a file of JSON lines, each with the number of its line and the byte where it begins. Its place is
    the file's, a colon and the number.

    Raises:
        DataError: the file is damaged, or holds something else than rows.
    """
    path = Path(source).expanduser()
    with _readable(path):
        for number, start, line in _lines(file, path):
            place = f"{path}:{number}"
            yield number, start, (place, _object(line, place))


def is_hub(source: str) -> bool:
    """True if a source is written like a data set of the hub: org/name, org/name/config, either with :split."""
    return HUB.fullmatch(source) is not None


def hub_rows(source: str) -> Iterator[Row]:
    """The rows of a data set of the hub; split "train" if none is named.

    Raises:
        DataError: it cannot be had.
        MissingExtra: `datasets` is not installed.
    """
    found = HUB.fullmatch(source)
    assert found is not None, source
    split = found["split"] or "train"
    try:
        table = hub_worker.hub(found["name"], found["config"], split)
    except ImportError as error:
        raise MissingExtra("datasets", "data") from error
    except Exception as error:  # the hub's client raises what it pleases
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"'{source}' is no file here, and split '{split}' of it could not be had from the hub; "
            f"check the name and the connection ({reason})"
        ) from error
    for number, row in enumerate(table, 1):
        yield f"{source}, row {number}", dict(row)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What goes wrong with a file, in a sentence."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _json(path: Path) -> Iterator[Row]:
    return _json_array(path) if _is_array(path) else _json_lines(path)


def _is_array(path: Path) -> bool:
    with _open(path) as file:
        return file.read(4096).lstrip().startswith("[")


def _json_lines(path: Path) -> Iterator[Row]:
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
        yield from (row for _, _, row in numbered_rows(str(path), file))


def _lines(file: Iterable[bytes], path: Path) -> Iterator[tuple[int, int, str]]:
    """Number, first byte and text of each line that is not blank."""
    number = end = 0
    for piece in file:
        for line in piece.splitlines(keepends=True):
            number, start, end = number + 1, end, end + len(line)
            if number == 1 and line.startswith(BOM_UTF8):
                start, line = len(BOM_UTF8), line[len(BOM_UTF8) :]
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                at = start + error.start
                raise DataError(f"{path} is not UTF-8 text (line {number}, byte {at}); save it as UTF-8") from error
            if text.strip():
                yield number, start, text


def _json_array(path: Path) -> Iterator[Row]:
    with _open(path) as file:
        text = file.read()
    try:
        items = STRICT.decode(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno} is not JSON ({error.msg}, column {error.colno})") from error
    except RepeatedKey as error:
        raise DataError(f"{path}, item {_item_of_repeated_key(text)} {error}") from error
    half_pairs = SURROGATE.search(text) is not None
    for number, item in enumerate(items, 1):
        place = f"{path}, item {number}"
        if not isinstance(item, dict):
            raise DataError(f"{place} is {_kind(item)}; each item must be one JSON object")
        if half_pairs:
            _check_letters(place, item)
        yield place, item


def _object(line: str, place: str) -> dict[str, Any]:
    rule = "each line must hold one JSON object"
    try:
        row = STRICT.decode(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{place} is not JSON ({error.msg}, column {error.colno}); {rule}") from error
    except RepeatedKey as error:
        raise DataError(f"{place} {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{place} is {_kind(row)}; {rule}")
    if SURROGATE.search(line):
        _check_letters(place, row)
    return row


class RepeatedKey(Exception):
    """What is wrong with a JSON object that has a key twice: one of the values would be lost."""


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise RepeatedKey(f"has the key '{_first_repeated([key for key, _ in pairs])}' twice; keep one of them")
    return made


STRICT = json.JSONDecoder(object_pairs_hook=_fields)


def _item_of_repeated_key(text: str) -> int:
    """The number of the first item of an array that has a key twice."""
    at, number = text.index("[") + 1, 0
    while True:
        number += 1
        while text[at] in ", \t\r\n":
            at += 1
        try:
            _, at = STRICT.raw_decode(text, at)
        except RepeatedKey:
            return number


def _first_repeated(names: Sequence[str]) -> str:
    return next((name for place, name in enumerate(names) if name in names[:place]), "")


def _check_letters(place: str, row: dict[str, Any]) -> None:
    """Refuse half of a surrogate pair, which JSON can write and no text can hold."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise DataError(f"{place} holds {half}, half of a surrogate pair and no letter; take it out") from error


def _csv(path: Path) -> Iterator[Row]:
    with _open(path, newline="") as file:
        csv.field_size_limit(LONGEST_CELL)
        reader = csv.DictReader(file, strict=True)
        last = 0  # where the row before ends: an open quote swallows lines, what matters is where it was opened
        try:
            _check_columns(path, reader.fieldnames or ())
            for row in reader:
                last = reader.line_num
                if None in row or None in row.values():
                    wanted = len(reader.fieldnames or ())
                    raise DataError(f"{path}:{last} has not the {wanted} cells that the header names")
                yield f"{path}:{last}", row
        except csv.Error as error:
            raise DataError(f"{path}:{max(last, 1) + 1} is not CSV ({error})") from error


def _check_columns(path: Path, names: Sequence[str]) -> None:
    """Refuse a column's name that is given twice: one of both would be lost. Columns without a name are not used."""
    name = _first_repeated([name for name in names if name])
    if name:
        raise DataError(f"{path} has two columns '{name}'; rename or remove one of them")


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtra("pyarrow", "data") from error
    number = 0
    try:
        table = parquet.ParquetFile(path)
        _check_columns(path, table.schema_arrow.names)
        for batch in table.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a readable Parquet file ({str(error).splitlines()[0]})") from error


READERS: Mapping[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}


def _suffix(source: str) -> str:
    return Path(source.lower().removesuffix(".gz")).suffix


def _open(path: Path, newline: str | None = None) -> TextIO:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline=newline)
    return path.open(encoding="utf-8-sig", newline=newline)


def _nearest_file(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"; there is no folder {folder} either"
    return nearest(path.name, [entry.name for entry in folder.iterdir() if entry.is_file()])


def _kind(value: object) -> str:
    names = {type(None): "null", bool: "true or false", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")
