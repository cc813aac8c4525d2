"""Rows of CSV and TSV files: `read_csv` holds them typed in Arrow, `stream_csv` reads in order."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from polytask.data.arrow import ArrowRows
from polytask.data.cells import convert, rows_of
from polytask.data.delimited import Delimited, Parsed
from polytask.data.problems import RowProblems
from polytask.data.records import Block, Dialect, Ints, read_blocks
from polytask.data.rows import Row
from polytask.data.stream import ChunkStream
from polytask.data.textfile import TextFile

BLOCK = 16 << 20
STREAM_BLOCK = 1 << 20


def read_csv(source: Delimited, max_bad: float = 0.01, block: int = BLOCK) -> ArrowRows:
    """All rows. A column is int or float when its filled cells are, but for `max_bad` of them;
    otherwise text. `DataError` when more than `max_bad` of the rows cannot be used."""
    path = source.file.path
    problems = RowProblems(str(path), max_bad)
    tables, places = [], Places(source.file, source.dialect)
    good = 0
    for raw in source.blocks(block):
        parsed = source.parse(raw)
        for problem in parsed.problems:
            problems.add(parsed.place(path, problem), problem.reason, problem.lines)
        good += len(parsed.table)
        places.add(parsed)
        tables.append(parsed.table)
    problems.check(good)
    empty = pa.table({name: pa.array([], pa.string()) for name in source.columns})
    text = pa.concat_tables(tables) if tables else empty
    typed, bad = typed_table(text, source.types, max_bad)
    for row, reason in bad.items():
        problems.add(f"{path}, line {places.line(row)}", reason)
    kept = np.delete(np.arange(len(text)), list(bad)) if bad else None
    if kept is not None:
        typed = typed.take(pa.array(kept))
    problems.conclude(len(typed))
    where = _LineNumbers(places, kept)
    return ArrowRows(typed.combine_chunks(), source.file.name, where, problems)


def stream_csv(source: Delimited, max_bad: float = 0.01, block: int = STREAM_BLOCK) -> ChunkStream:
    """Rows in order; types of columns are those of the first megabyte."""
    reader = _CsvReader(source, max_bad, block)
    return ChunkStream(source.file.name, source.columns, reader, max_bad)


def typed_table(text: pa.Table, types: Any, tolerance: float) -> tuple[pa.Table, dict[int, str]]:
    """Columns as the numbers they hold; and row -> reason where a cell is no number."""
    columns, bad = {}, {}
    for name, cells in zip(text.column_names, text.columns):
        column = convert(cells, types.get(name), tolerance)
        columns[name] = column.cells
        if column.bad is not None:
            for row in np.flatnonzero(column.bad):
                wrong = cells[int(row)].as_py()
                expected = "an integer" if column.type == "int" else "a number"
                bad[int(row)] = (
                    f"'{wrong[:40]}' in column '{name}' is not {expected} "
                    f"(say types: {{{name}: text}} if the column is text)"
                )
    return pa.table(columns), dict(sorted(bad.items()))


class Places:
    """On which physical line each parsed row stands, from a few integers per block."""

    def __init__(self, file: TextFile, dialect: Dialect) -> None:
        self.file, self._dialect = file, dialect
        self._firsts: list[int] = []
        self._blocks: list[tuple[int, int, int, bool, Ints | None]] = []
        self._rows = 0

    def add(self, parsed: Parsed) -> None:
        block = parsed.block
        complete = len(parsed.records) == len(block)
        self._firsts.append(self._rows)
        self._blocks.append(
            (
                block.offset,
                len(block.data),
                block.line,
                block.lines == len(block),  # every record is one line
                None if complete else parsed.records,
            )
        )
        self._rows += len(parsed.records)

    def line(self, row: int) -> int:
        """The line on which parsed row `row` starts; reads one block again where rows take
        several lines."""
        known = bisect_right(self._firsts, row) - 1
        offset, size, line, single, records = self._blocks[known]
        record = row - self._firsts[known]
        if records is not None:
            record = int(records[record])
        if single:
            return line + record
        block = next(read_blocks(self.file, self._dialect, size, offset, line))
        return block.line_of(record)


@dataclass(frozen=True)
class _LineNumbers:
    places: Places
    kept: Ints | None

    def __call__(self, index: int) -> str:
        row = index if self.kept is None else int(self.kept[index])
        return f"{self.places.file.path}, line {self.places.line(row)}"


class _CsvReader:
    def __init__(self, source: Delimited, tolerance: float, size: int) -> None:
        self._source, self._size = source, size
        self._types = dict(source.types)
        first = next(iter(source.blocks(size)), None)
        if first is not None:
            text = source.parse(first).table
            for name, cells in zip(text.column_names, text.columns):
                guessed = convert(cells, self._types.get(name), tolerance).type
                self._types.setdefault(name, guessed)

    def chunks(self, mark: tuple[int, ...] | None) -> Iterator[_CsvChunk]:
        offset, line = mark if mark is not None else (None, None)
        for block in self._source.blocks(self._size, offset, line):
            yield _CsvChunk(self._source, block, self._types)


@dataclass(frozen=True)
class _CsvChunk:
    source: Delimited
    block: Block
    types: dict[str, str]

    @property
    def mark(self) -> tuple[int, ...]:
        return (self.block.offset, self.block.line)

    @cached_property
    def _parsed(self) -> Parsed:
        return self.source.parse(self.block)

    @cached_property
    def _typed(self) -> tuple[pa.Table, Ints, dict[int, str]]:
        table, bad = typed_table(self._parsed.table, self.types, 0.0)
        kept = np.delete(np.arange(len(table)), list(bad))
        return (table.take(pa.array(kept)) if bad else table), kept, bad

    def __len__(self) -> int:
        return len(self._typed[1])

    def rows(self, start: int, stop: int) -> Sequence[Row]:
        return rows_of(self._typed[0].slice(start, stop - start))

    def where(self, index: int) -> str:
        record = int(self._parsed.records[self._typed[1][index]])
        return f"{self.source.file.path}, line {self.block.line_of(record)}"

    def problems(self) -> Sequence[tuple[str, str, int]]:
        path, parsed = self.source.file.path, self._parsed
        found = [(parsed.place(path, p), p.reason, p.lines) for p in parsed.problems]
        for row, reason in self._typed[2].items():
            line = self.block.line_of(int(parsed.records[row]))
            found.append((f"{path}, line {line}", reason, 1))
        return found
