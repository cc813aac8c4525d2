"""CSV and TSV: text cells from blocks of records, with every unusable row found and located.

pyarrow parses whole blocks. What it cannot say (on which line a row stands, which record holds a
wrong byte) is found beside it, and only in blocks that have something wrong.
"""

from __future__ import annotations

import codecs
import io
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from polytask.data.arrow import check_header, too_large
from polytask.data.records import Block, Dialect, Ints, read_blocks, walk
from polytask.data.textfile import TextFile, text_file
from polytask.errors import DataError, suggestion

SEPARATORS = (",", "\t", ";", "|")
_DECIMAL = re.compile(r"^\s*[+-]?(\d+[.,]\d*|[.,]\d+)([eE][+-]?\d+)?\s*$|^\s*-\d+\s*$")
_NUMBER = re.compile(r"^\s*[+-]?\d+([.,]\d+)*([eE][+-]?\d+)?\s*$")
_HEAD = 1 << 16


@dataclass(frozen=True)
class Problem:
    """Records of a block that cannot be used."""

    record: int
    reason: str
    lines: int = 1


@dataclass(frozen=True)
class Parsed:
    """A block's usable records as a table of text, their numbers, and what was wrong elsewhere."""

    block: Block
    table: pa.Table
    records: Ints
    problems: list[Problem]

    def place(self, path: Path, problem: Problem) -> str:
        """'reviews.csv, line 18'."""
        line = self.block.line_of(problem.record)
        if problem.lines > 1:
            return f"{path}, lines {line}-{line + problem.lines - 1}"
        return f"{path}, line {line}"


@dataclass(frozen=True)
class Delimited:
    """A CSV or TSV file: its dialect, its columns and where its rows begin."""

    file: TextFile
    dialect: Dialect
    columns: tuple[str, ...]
    offset: int  # of the first row
    line: int  # of the first row
    types: Mapping[str, str]  # declared by the user

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        separator: str | None = None,
        quote: str = '"',
        encoding: str | None = None,
        columns: tuple[str, ...] = (),
        types: Mapping[str, str] | None = None,
    ) -> Delimited:
        """Read the header; `DataError` for a missing or ambiguous one."""
        file = text_file(path, encoding)
        with file.open() as reader:
            head = reader.read(_HEAD)
        if separator is None:
            separator = _guess_separator(head, quote)
        dialect = Dialect(separator, quote)
        first = next(read_blocks(file, dialect, _HEAD), None)
        if first is None:
            raise DataError(f"{path} is empty: it has only blank lines")
        if first.unclosed:
            raise DataError(f"{path}, line 1: a quote is opened and never closed")
        position = int(np.flatnonzero(_filled(first))[0])
        line = first.line_of(position)
        if columns:
            check_header(columns, f"{path}: columns")
            names, offset = columns, int(first.starts[position])
        else:
            names = _header(first, position, dialect, path, line)
            offset = int(first.ends[position]) + 1
            line += first.lines_in(position)
        for name in types or {}:
            if name not in names:
                raise DataError(
                    f"{path}: types names a column '{name}' that the file has not."
                    f"{suggestion(name, names)}"
                )
        return cls(file, dialect, names, offset, line, dict(types or {}))

    def blocks(self, size: int, offset: int | None = None, line: int | None = None) -> Any:
        """Blocks of records, from the first row or from where a block began."""
        return read_blocks(
            self.file,
            self.dialect,
            size,
            self.offset if offset is None else offset,
            self.line if line is None else line,
        )

    def parse(self, block: Block) -> Parsed:
        """The block's rows as text; see `Parsed`."""
        if block.unclosed:
            reason = (
                "a quote is opened here and never closed (is the file whole? if quotes are "
                "ordinary characters in it, say quote: '')"
            )
            nothing = pa.table({name: pa.array([], pa.string()) for name in self.columns})
            problem = Problem(0, reason, block.lines)
            return Parsed(block, nothing, np.empty(0, np.int64), [problem])
        reasons = _wrong_bytes(block, self.dialect)
        table, records = self._parse_except(block, reasons)
        bad = self._wrong_rows(table)
        reasons |= {int(records[row]): reason for row, reason in bad.items()}
        if bad:
            keep = np.delete(np.arange(len(table)), list(bad))
            table, records = table.take(pa.array(keep)), records[keep]
        problems = [
            Problem(record, reason, block.lines_in(record))
            for record, reason in sorted(reasons.items())
        ]
        return Parsed(block, table, records, problems)

    def _parse_except(self, block: Block, reasons: dict[int, str]) -> tuple[pa.Table, Ints]:
        """Parse the block without the records in `reasons`; adds those of a wrong width."""
        records = np.arange(len(block), dtype=np.int64)
        data = block.data
        if reasons:
            records = np.delete(records, list(reasons))
            data = b"".join(data[block.starts[i] : block.ends[i] + 1] for i in records)
        if not data:
            return pa.table({name: pa.array([], pa.string()) for name in self.columns}), records
        if data.startswith(codecs.BOM_UTF8):
            data = codecs.BOM_UTF8 + data  # pyarrow takes one away, wherever the block stands
        wrong: dict[int, str] = {}

        def note(row: pyarrow.csv.InvalidRow) -> str:
            has, width = row.actual_columns, row.expected_columns
            wrong[row.number - 1] = f"{has} cell{'s' * (has != 1)} instead of {width}"
            return "skip"

        table = pyarrow.csv.read_csv(
            io.BytesIO(data),
            read_options=pyarrow.csv.ReadOptions(
                use_threads=False, column_names=self.columns, block_size=len(data) + 1
            ),
            parse_options=pyarrow.csv.ParseOptions(
                delimiter=self.dialect.separator,
                quote_char=self.dialect.quote or False,
                newlines_in_values=bool(self.dialect.quote),
                ignore_empty_lines=False,
                invalid_row_handler=note,
            ),
            convert_options=pyarrow.csv.ConvertOptions(
                check_utf8=False,  # checked before, record by record
                column_types={name: pa.string() for name in self.columns},
                strings_can_be_null=False,
            ),
        )
        if len(table) + len(wrong) != len(records):
            raise DataError(
                f"{self.file.path}: the rows from line {block.line} on cannot be told apart; "
                "is the separator or the quote character another one?"
            )
        reasons |= {int(records[row]): reason for row, reason in wrong.items()}
        return table, np.delete(records, list(wrong)) if wrong else records

    def _wrong_rows(self, table: pa.Table) -> dict[int, str]:
        bad: dict[int, str] = {}
        for name, column in zip(self.columns, table.columns):
            reason = f"the cell '{name}' holds more than 10 MB"
            bad |= {int(row): reason for row in too_large(column)}
        empty = np.ones(len(table), bool)
        for column in table.columns:
            if not empty.any():
                break
            empty &= pc.equal(column, "").to_numpy()
        return bad | {int(row): "the row is empty" for row in np.flatnonzero(empty)}


def _filled(block: Block) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which records are more than a blank line."""
    length = block.ends - block.starts
    codes = np.frombuffer(block.data, np.uint8)
    return np.asarray((length > 1) | ((length == 1) & (codes[block.starts] != 13)))


def _wrong_bytes(block: Block, dialect: Dialect) -> dict[int, str]:
    """Records with NUL bytes, bytes that are not UTF-8, or a carriage return that ends no line."""
    reasons: dict[int, str] = {}
    codes = np.frombuffer(block.data, np.uint8)
    if b"\r" in block.data:
        returns = np.flatnonzero(codes == 13)
        lone = returns[codes[returns + 1] != 10]
        for record in block.records_at(lone):
            if _outside_quotes(block, int(record), dialect):
                reasons[int(record)] = "a carriage return stands inside an unquoted cell"
    if b"\0" in block.data:
        for record in block.records_at(np.flatnonzero(codes == 0)):
            reasons[int(record)] = "it holds a NUL byte"
    for record in _not_utf8(block):
        reasons[record] = "it is not UTF-8 (name the encoding with 'encoding:')"
    return reasons


def _outside_quotes(block: Block, record: int, dialect: Dialect) -> bool:
    data = block.data[block.starts[record] : block.ends[record]].removesuffix(b"\r")
    return any(b"\r" in outside for _, outside in _cells(data, dialect))


def _not_utf8(block: Block) -> Iterator[int]:
    try:
        block.data.decode("utf-8")
        return
    except UnicodeDecodeError as error:
        first = int(block.records_at(np.array([error.start]))[0])
    for record in range(first, len(block)):
        try:
            block.data[block.starts[record] : block.ends[record]].decode("utf-8")
        except UnicodeDecodeError:
            yield record


def _cells(data: bytes, dialect: Dialect) -> Iterator[tuple[bytes, bytes]]:
    """Cells of one record without its line end, and what of each stands outside quotes."""
    quote, separator = dialect.quote.encode(), dialect.separator.encode()
    position = 0
    while True:
        cell = b""
        if quote and data.startswith(quote, position):
            match = dialect.quoted.match(data, position)
            end = len(data) if match is None else match.end()
            cell = data[position + 1 : end - 1].replace(quote * 2, quote)
            position = end
        end = data.find(separator, position)
        end = len(data) if end < 0 else end
        outside = data[position:end]
        yield cell + outside, outside
        if end >= len(data):
            return
        position = end + 1


def _guess_separator(head: bytes, quote: str) -> str:
    """The separator that cuts the first records into equally many cells, and most of them."""
    best, best_score = ",", (False, 1)
    for separator in SEPARATORS:
        dialect = Dialect(separator, quote)
        records = (head[start:end].strip(b"\r\n") for start, end in walk(head, dialect))
        first = itertools.islice((record for record in records if record), 5)
        widths = [sum(1 for _ in _cells(record, dialect)) for record in first]
        if widths and widths[0] > 1:
            score = (min(widths) == max(widths), widths[0])
            if score > best_score:
                best, best_score = separator, score
    return best


def _header(
    block: Block, position: int, dialect: Dialect, path: Path, line: int
) -> tuple[str, ...]:
    data = block.data[block.starts[position] : block.ends[position]].removesuffix(b"\r")
    try:
        names = [cell.decode("utf-8").lstrip("\ufeff").strip() for cell, _ in _cells(data, dialect)]
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, line {line}: the header is not UTF-8; name the encoding with 'encoding:' "
            "(for instance latin-1, cp1252, utf-16)"
        ) from error
    if any("\0" in name for name in names):
        raise DataError(
            f"{path}, line {line}: the header holds NUL bytes; this is not a text file, "
            "or its encoding is utf-16 (say encoding: utf-16-le)"
        )
    if names[0] == "" and len(names) > 1 and "index" not in names:
        names[0] = "index"  # what pandas writes for an unnamed index
    if any(_DECIMAL.match(name) for name in names) or all(_NUMBER.match(name) for name in names):
        raise DataError(
            f"{path}, line {line}: '{dialect.separator.join(names)[:80]}' looks like data, not "
            "like a header. Add a line with column names, or give them with 'columns: [...]'"
        )
    if "" in names:
        raise DataError(f"{path}, line {line}: column {names.index('') + 1} has no name")
    check_header(names, f"{path}, line {line}")
    return tuple(names)
