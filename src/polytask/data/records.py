"""Cuts text files into blocks of whole records, and knows on which line each record stands.

A record ends at a line end that is not inside quotes. For a block whose quotes all open at the
start of a cell and close at its end, that is a question of parity, answered with vectorised
arithmetic; other blocks are walked record by record, under the rules of the CSV parser (a quote
inside an unquoted cell is an ordinary character).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from polytask.data.textfile import TextFile
from polytask.errors import DataError

Ints = npt.NDArray[np.int64]
MAX_RECORD = 64 * 1024 * 1024
_NEWLINE, _RETURN = 10, 13


@dataclass(frozen=True)
class Dialect:
    """Characters that give a record its structure; quote '' means that nothing is quoted."""

    separator: str = ","
    quote: str = '"'

    @cached_property
    def record(self) -> re.Pattern[bytes]:
        """Matches one record with its line end."""
        cell = self._cell
        separator = re.escape(self.separator.encode())
        return re.compile(b"(?:" + cell + b")(?:" + separator + b"(?:" + cell + b"))*+\n")

    @cached_property
    def quoted(self) -> re.Pattern[bytes]:
        """Matches the quoted part of a cell."""
        return re.compile(self._quoted)

    @property
    def _quoted(self) -> bytes:
        quote = re.escape(self.quote.encode())
        # Possessive (*+): a doubled quote must never be taken apart to make a record fit.
        no_quote = b"[^" + quote + b"]*+"
        return quote + no_quote + b"(?:" + quote * 2 + no_quote + b")*+" + quote

    @property
    def _cell(self) -> bytes:
        plain = b"[^" + re.escape(self.separator.encode()) + b"\n]*+"
        if not self.quote:
            return plain
        return self._quoted + plain + b"|(?!" + re.escape(self.quote.encode()) + b")" + plain


LINES = Dialect(separator="\n", quote="")
"""A record is a line, whatever is in it (JSONL)."""


@dataclass(frozen=True)
class Block:
    """Whole records that stand together in a file."""

    data: bytes
    offset: int  # of data, in the text file
    line: int  # of the first record, from 1
    ends: Ints  # index in data of each record's line end
    unclosed: bool = False  # one record, whose quote is never closed: the rest of the file

    def __len__(self) -> int:
        return len(self.ends)

    @cached_property
    def starts(self) -> Ints:
        return np.concatenate(([0], self.ends[:-1] + 1)).astype(np.int64)

    @cached_property
    def lines(self) -> int:
        """Physical lines in the block."""
        return self.data.count(b"\n")

    def line_of(self, record: int) -> int:
        """The physical line on which a record starts."""
        return self.line + self.data.count(b"\n", 0, int(self.starts[record]))

    def lines_in(self, record: int) -> int:
        """How many physical lines a record takes."""
        return self.data.count(b"\n", int(self.starts[record]), int(self.ends[record]) + 1)

    def records_at(self, positions: Ints) -> Ints:
        """Records that hold the bytes at `positions`, each once."""
        return np.unique(np.searchsorted(self.ends, positions))


def read_blocks(
    file: TextFile, dialect: Dialect, size: int, offset: int = 0, line: int = 1
) -> Iterator[Block]:
    """Blocks of about `size` bytes from `offset`, where line number `line` begins.

    A block is looked for in the `size` bytes after its beginning, then in twice as many, and so on:
    where it ends depends on where it begins only, so that an index of blocks stays true.
    Blank lines at the end of the file are no records. A record of more than 64 MB is an error.
    """
    with file.open(offset) as reader:
        text, begin, window = b"", 0, size
        while True:
            if (needed := window - (len(text) - begin)) > 0:
                text, begin = text[begin:] + reader.read(needed), 0
            data = text[begin : begin + window]
            last = len(data) < window
            if last:
                data = _without_blank_end(data)
                if not data:
                    return
            ends = _record_ends(data, dialect)
            cut = _cut(data, ends, last)
            if cut:
                block = Block(data[:cut], offset, line, ends[ends < cut])
                yield block
                offset, line = offset + cut, line + block.lines
                begin, window = begin + cut, size
            if last:
                if kept := data[cut:]:
                    yield Block(kept, offset, line, np.array([len(kept) - 1]), unclosed=True)
                return
            if not cut:
                if window > MAX_RECORD:
                    raise DataError(
                        f"{file.path}, line {line}: a row of more than {MAX_RECORD >> 20} MB "
                        "starts here; probably a quote is opened and never closed "
                        "(set quote: '' if quotes are ordinary characters)"
                    )
                window *= 2


def _without_blank_end(data: bytes) -> bytes:
    """The end of a file up to the line end of its last filled line, which gets one if need be."""
    filled = len(data.rstrip(b"\r\n"))
    end = data.find(b"\n", filled)
    if not filled:
        return b""
    return data[:filled] + b"\n" if end < 0 else data[: end + 1]


def _cut(data: bytes, ends: Ints, last: bool) -> int:
    """Where to end the block: after its last record, but before blank lines that end the data,
    since those are no records if nothing follows."""
    if not len(ends):
        return 0
    cut = int(ends[-1]) + 1
    start = int(ends[-2]) + 1 if len(ends) > 1 else 0
    if last or data[start:cut].strip(b"\r\n"):
        return cut
    filled = len(data[:cut].rstrip(b"\r\n"))
    return int(ends[np.searchsorted(ends, filled)]) + 1 if filled else 0


def _record_ends(data: bytes, dialect: Dialect) -> Ints:
    codes = np.frombuffer(data, np.uint8)
    newlines = np.flatnonzero(codes == _NEWLINE)
    if not dialect.quote or dialect.quote.encode() not in data:
        return newlines
    quotes = np.flatnonzero(codes == ord(dialect.quote))
    if not _well_quoted(codes, quotes, dialect):
        return np.array([end for _, end in walk(data, dialect)], dtype=np.int64)
    outside: Ints = newlines[np.searchsorted(quotes, newlines) % 2 == 0]
    return outside


def _well_quoted(codes: npt.NDArray[np.uint8], quotes: Ints, dialect: Dialect) -> bool:
    """Whether each quote that would open a cell stands at a cell's start (or doubles the one
    before), and each that would close it at a cell's end (or is doubled by the next)."""
    opening, closing = quotes[0::2], quotes[1::2]
    before = codes[np.maximum(opening - 1, 0)]
    after = codes[np.minimum(closing + 1, len(codes) - 1)]
    neighbours = (ord(dialect.separator), _NEWLINE, ord(dialect.quote))
    opens = (opening == 0) | np.isin(before, neighbours)
    closes = (closing == len(codes) - 1) | np.isin(after, (*neighbours, _RETURN))
    return bool(opens.all() and closes.all())


def walk(data: bytes, dialect: Dialect) -> Iterator[tuple[int, int]]:
    """(start, end) of each whole record, one after the other; data[end] is its line end."""
    start = 0
    while start < len(data) and (found := dialect.record.match(data, start)) is not None:
        yield start, found.end() - 1
        start = found.end()
