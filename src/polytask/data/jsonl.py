"""JSONL (one JSON object a line), and JSON files that hold one array of objects.

Cells stay what JSON says they are, mixed types and nested values included, so rows are kept as
bytes (memory-mapped where the file is plain UTF-8) with the place of each line, and decoded when
taken.
"""

from __future__ import annotations

import json
import mmap
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from polytask.data.problems import MAX_CELL, RowProblems
from polytask.data.records import LINES, Block, Ints, read_blocks
from polytask.data.rows import Row
from polytask.data.stream import ChunkStream
from polytask.data.textfile import TextFile
from polytask.errors import DataError

BLOCK = 4 << 20
STREAM_BLOCK = 1 << 20
_SPACE = b" \t\r\n"
_TOGETHER = 1024  # rows decoded in one call, which costs half of as many calls


class JsonRows:
    """A `RowSource` over the lines of a text; columns are all keys, absent ones give None."""

    def __init__(
        self,
        data: bytes | None,
        starts: Ints,
        stops: Ints,
        columns: tuple[str, ...],
        path: Path,
        lines: Ints | None,
        problems: RowProblems,
    ) -> None:
        self.name = path.name
        self.columns = columns
        self.problems = problems
        self._bytes, self._starts, self._stops = data, starts, stops
        self._path, self._lines = path, lines

    @cached_property
    def _data(self) -> bytes | mmap.mmap:
        """The text: the file itself, mapped, unless it had to be unpacked or transcoded."""
        if self._bytes is not None:
            return self._bytes
        with self._path.open("rb") as handle:
            return mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_data"}

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Row:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} rows, not {index}")
        return self.take([index])[0]

    def take(self, indices: Sequence[int]) -> list[Row]:
        blank: dict[str, Any] = dict.fromkeys(self.columns)
        places = np.asarray(indices, dtype=np.int64)
        return [{**blank, **row} for row in self._decoded(places)]

    def column(self, name: str) -> list[Any]:
        """All cells of one column."""
        return [row.get(name) for row in self._decoded(np.arange(len(self)))]

    def _decoded(self, places: Ints) -> Iterator[dict[str, Any]]:
        """Rows as they stand in the file. Each was checked alone, so many are decoded at once."""
        for first in range(0, len(places), _TOGETHER):
            part = places[first : first + _TOGETHER]
            spans = zip(self._starts[part].tolist(), self._stops[part].tolist())
            yield from json.loads(b"[%b]" % b",".join(self._data[a:b] for a, b in spans))

    def where(self, index: int) -> str:
        if self._lines is None:
            return f"{self._path}, item {index + 1}"
        return f"{self._path}, line {int(self._lines[index])}"


def read_jsonl(file: TextFile, max_bad: float = 0.01, block: int = BLOCK) -> JsonRows:
    """All rows; `DataError` when more than `max_bad` of the lines cannot be used."""
    if _is_array(file):
        return _read_array(file, max_bad)
    problems = RowProblems(str(file.path), max_bad)
    columns: dict[str, None] = {}
    parts: list[_Lines] = []
    kept: list[bytes] = []
    for raw in read_blocks(file, LINES, block):
        lines = _Lines.of(raw)
        for row in lines.decoded():
            if not columns.keys() >= row.keys():
                columns.update(dict.fromkeys(row))
        for line, reason in lines.bad:
            problems.add(f"{file.path}, line {line}", reason)
        parts.append(lines.only_places(raw.offset))
        if not file.plain:
            kept.append(raw.data)
    starts, stops, numbers = (
        np.concatenate([getattr(part, name) for part in parts] or [np.empty(0, np.int64)])
        for name in ("starts", "stops", "lines")
    )
    problems.conclude(len(starts))
    data = None if file.plain else b"".join(kept)
    if file.plain:
        starts, stops = starts + file.start, stops + file.start
    return JsonRows(data, starts, stops, tuple(columns), file.path, numbers, problems)


def stream_jsonl(file: TextFile, max_bad: float = 0.01, block: int = STREAM_BLOCK) -> ChunkStream:
    """Rows in order. Columns are the keys met in the first megabyte; keys that first appear later
    are in the rows all the same."""
    if _is_array(file):
        raise DataError(
            f"{file.path} is one JSON array, which cannot be read in order; write one object a "
            "line, or leave streaming out"
        )
    reader = _JsonReader(file, block)
    return ChunkStream(file.path.name, reader.columns, reader, max_bad)


class _JsonReader:
    def __init__(self, file: TextFile, size: int) -> None:
        self._file, self._size = file, size
        first = next(read_blocks(file, LINES, size), None)
        rows = [] if first is None else list(_Lines.of(first).decoded())
        self.columns = tuple(dict.fromkeys(key for row in rows for key in row))

    def chunks(self, mark: tuple[int, ...] | None) -> Iterator[_JsonChunk]:
        offset, line = mark if mark is not None else (0, 1)
        for block in read_blocks(self._file, LINES, self._size, offset, line):
            yield _JsonChunk(self._file, block, self.columns)


@dataclass(frozen=True)
class _JsonChunk:
    file: TextFile
    block: Block
    columns: tuple[str, ...]

    @property
    def mark(self) -> tuple[int, ...]:
        return (self.block.offset, self.block.line)

    @cached_property
    def _read(self) -> tuple[_Lines, list[dict[str, Any]]]:
        lines = _Lines.of(self.block)
        return lines, list(lines.decoded())

    def __len__(self) -> int:
        return len(self._read[1])

    def rows(self, start: int, stop: int) -> Sequence[Row]:
        blank: dict[str, Any] = dict.fromkeys(self.columns)
        return [{**blank, **row} for row in self._read[1][start:stop]]

    def where(self, index: int) -> str:
        return f"{self.file.path}, line {int(self._read[0].lines[index])}"

    def problems(self) -> Sequence[tuple[str, str, int]]:
        return [(f"{self.file.path}, line {n}", why, 1) for n, why in self._read[0].bad]


class _Lines:
    """The usable lines of a block: where they are in it and which line numbers they have."""

    def __init__(self, starts: Ints, stops: Ints, lines: Ints, data: bytes) -> None:
        self.starts, self.stops, self.lines, self._data = starts, stops, lines, data
        self.bad: list[tuple[int, str]] = []

    @classmethod
    def of(cls, block: Block) -> _Lines:
        lines = np.arange(len(block), dtype=np.int64) + block.line
        return cls(block.starts, block.ends, lines, block.data)

    def decoded(self) -> Iterator[dict[str, Any]]:
        """Rows of the usable lines; the others go to `bad` and out of the places."""
        unusable: list[int] = []
        for first in range(0, len(self.starts), _TOGETHER):
            part = slice(first, first + _TOGETHER)
            spans = zip(self.starts[part].tolist(), self.stops[part].tolist())
            lines = [self._data[start:stop] for start, stop in spans]
            rows = _decode_together(lines)
            if rows is not None:
                yield from rows
                continue
            for place, line in enumerate(lines, first):
                row = _decode(line)
                if isinstance(row, str):
                    self.bad.append((int(self.lines[place]), row))
                    unusable.append(place)
                else:
                    yield row
        if unusable:
            self.starts, self.stops, self.lines = (
                np.delete(values, unusable) for values in (self.starts, self.stops, self.lines)
            )

    def only_places(self, offset: int) -> _Lines:
        """The same, as places in the file, without the text."""
        return _Lines(self.starts + offset, self.stops + offset, self.lines, b"")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key '{twice}' is given twice")
    return made


_decoder = json.JSONDecoder(object_pairs_hook=_unique)


def _decode_together(lines: list[bytes]) -> list[dict[str, Any]] | None:
    """The rows of lines that are all usable in the plain way; None asks for a closer look at each.

    Between any two lines goes a number that nobody can guess. That each stands at an odd place of
    the list shows that every line is one value: no two lines made one, and none made two.
    """
    mark = secrets.randbits(62)
    text = b"[%b]" % (b",%d," % mark).join(lines)
    if b"\\ud" in text or b"\\uD" in text or len(text) > MAX_CELL:
        return None
    try:
        found = _decoder.decode(text.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    rows: list[dict[str, Any]] = found[::2]
    if len(rows) != len(lines) or found[1::2] != [mark] * (len(lines) - 1):
        return None
    return rows if all(type(row) is dict and any(row.values()) for row in rows) else None


def _decode(line: bytes) -> dict[str, Any] | str:
    """The row, or why there is none."""
    try:
        row = _decoder.decode(line.decode("utf-8"))
    except UnicodeDecodeError:
        return "it is not UTF-8 (name the encoding with 'encoding:')"
    except json.JSONDecodeError as error:
        return "the row is empty" if not line.strip() else f"it is not JSON: {error.msg}"
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits; nested too deeply
        return f"it is not usable JSON: {error}"
    return check_row(row, line)


def check_row(row: Any, line: bytes) -> dict[str, Any] | str:
    """The row if it is an object with usable cells, else what is wrong."""
    if not isinstance(row, dict):
        return f"it is {_KINDS.get(type(row), 'a value')}, not an object with named cells"
    if not any(row.values()) and all(value is None or value == "" for value in row.values()):
        return "the row is empty"
    if len(line) > MAX_CELL:
        for key, value in row.items():
            if len(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")) > MAX_CELL:
                return f"the cell '{key}' holds more than 10 MB"
    if b"\\ud" in line or b"\\uD" in line:
        try:
            json.dumps(row, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            return "it holds half of a surrogate pair, which is no character"
    return row


_KINDS = {list: "a list", str: "a text", int: "a number", float: "a number", bool: "a truth value"}


def _is_array(file: TextFile) -> bool:
    with file.open() as reader:
        return reader.read(4096).lstrip(_SPACE).startswith(b"[")


def _read_array(file: TextFile, max_bad: float) -> JsonRows:
    with file.open() as reader:
        text = b"".join(iter(lambda: reader.read(BLOCK), b""))
    try:
        items = _decoder.decode(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file.path} is not JSON: {error}") from error
    problems = RowProblems(str(file.path), max_bad)
    columns: dict[str, None] = {}
    kept = []
    for place, item in enumerate(items):
        line = json.dumps(item, ensure_ascii=True).encode()
        row = check_row(item, line)
        if isinstance(row, str):
            problems.add(f"{file.path}, item {place + 1}", row)
        else:
            kept.append(line)
            columns.update(dict.fromkeys(row))
    problems.conclude(len(kept))
    stops = np.cumsum([len(line) for line in kept], dtype=np.int64)
    starts = np.concatenate(([0], stops[:-1])).astype(np.int64) if kept else stops
    return JsonRows(b"".join(kept), starts, stops, tuple(columns), file.path, None, problems)
