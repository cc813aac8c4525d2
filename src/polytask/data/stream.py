"""`ChunkStream`: rows in order, never more than a chunk of them in memory.

While reading, it notes where each chunk began (a sparse index of a few integers per chunk), so
that reading from a position seeks to the chunk that holds it instead of starting over. Rows that
fail validation have no position: the same position means the same row, whoever reads it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from polytask.data.problems import RowProblems
from polytask.data.rows import Row, RowSource

_SLICE = 256
_ENOUGH = 1000  # rows after which the share of bad ones means something


class Chunk(Protocol):
    """Some rows that stand together. `len` must be cheap; `rows` may read and convert."""

    mark: tuple[int, ...]

    def __len__(self) -> int: ...
    def rows(self, start: int, stop: int) -> Sequence[Row]: ...
    def where(self, index: int) -> str: ...
    def problems(self) -> Sequence[tuple[str, str, int]]:
        """(where, reason, rows) of what is left out of this chunk."""


class ChunkReader(Protocol):
    """Reads chunks from the start (mark None) or from where a chunk began."""

    def chunks(self, mark: tuple[int, ...] | None) -> Iterator[Any]: ...


class ChunkStream:
    """A `StreamSource` over a `ChunkReader`."""

    def __init__(
        self, name: str, columns: tuple[str, ...], reader: ChunkReader, max_bad: float = 0.01
    ) -> None:
        self.name = name
        self.columns = columns
        self.problems = RowProblems(name, max_bad)
        self._reader = reader
        self._firsts: list[int] = []  # position of each known chunk's first row
        self._marks: list[tuple[int, ...]] = []
        self._length: int | None = None

    def read_from(self, position: int) -> Iterator[Row]:
        """Rows from `position` on; `DataError` when too many rows are bad."""
        for first, chunk in self._chunks_from(position):
            for start in range(max(position - first, 0), len(chunk), _SLICE):
                yield from chunk.rows(start, min(start + _SLICE, len(chunk)))

    def __iter__(self) -> Iterator[Row]:
        return self.read_from(0)

    def count(self) -> int:
        """The number of usable rows; reads to the end once, without making rows."""
        if self._length is None:
            for _ in self._chunks_from(self._firsts[-1] if self._firsts else 0):
                pass
        assert self._length is not None
        return self._length

    def where(self, index: int) -> str:
        for first, chunk in self._chunks_from(index):
            if first <= index < first + len(chunk):
                return str(chunk.where(index - first))
        return f"{self.name}, row {index + 1}"

    def _chunks_from(self, position: int) -> Iterator[tuple[int, Any]]:
        """Chunks, with the position of their first row, from the last known one that begins at
        or before `position`."""
        known = max(bisect_right(self._firsts, position) - 1, 0)
        first = self._firsts[known] if self._firsts else 0
        mark = self._marks[known] if self._marks else None
        for chunk in self._reader.chunks(mark):
            if not self._marks or chunk.mark > self._marks[-1]:
                self._note(chunk, first)
            yield first, chunk
            first += len(chunk)
        self._length = first
        self.problems.conclude(first)

    def _note(self, chunk: Chunk, first: int) -> None:
        self._marks.append(chunk.mark)
        self._firsts.append(first)
        for where, reason, rows in chunk.problems():
            self.problems.add(where, reason, rows)
        good = first + len(chunk)
        if good + self.problems.bad >= _ENOUGH:
            self.problems.check(good)


class StreamOf:
    """A map-style source read in order."""

    def __init__(self, source: RowSource) -> None:
        self.source = source
        self.name = source.name
        self.columns = source.columns

    def read_from(self, position: int) -> Iterator[Row]:
        for start in range(position, len(self.source), _SLICE):
            yield from self.source.take(range(start, min(start + _SLICE, len(self.source))))

    def count(self) -> int:
        return len(self.source)

    def where(self, index: int) -> str:
        return self.source.where(index)
