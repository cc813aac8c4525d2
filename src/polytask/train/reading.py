"""Rows of a split by index, whatever they come from, and encoded examples kept in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from polytask.data.rows import Row, RowSource, StreamSource
from polytask.errors import DataError

Key = tuple[int, int, int]  # group, index, epoch


class RowReader:
    """Rows of one group's split by index, from a map-style source or a stream.

    A stream is read on from where it stands; it is opened anew to go back or far ahead, and starts
    over at its end.
    """

    FAR = 10_000  # rows worth skipping one by one instead of opening the stream again

    def __init__(self, source: RowSource | StreamSource) -> None:
        self.source = source
        self._stream: Iterator[Row] | None = None
        self._position = 0
        self._length: int | None = None

    def take(self, indices: Sequence[int]) -> list[Row]:
        if isinstance(self.source, RowSource):
            return self.source.take(indices)
        return [self._next(self.source, index) for index in indices]

    def _next(self, source: StreamSource, index: int) -> Row:
        if self._length is not None:
            index %= self._length
        ahead = index - self._position
        if self._stream is None or not 0 <= ahead <= self.FAR:
            self._stream, self._position = source.read_from(index), index
        for row in self._stream:
            self._position += 1
            if self._position > index:
                return row
        return self._start_over(source, index)

    def _start_over(self, source: StreamSource, index: int) -> Row:
        if self._length is None:
            self._length = sum(1 for _ in source.read_from(0))
            if not self._length:
                raise DataError(f"{source.name} has no rows")
        self._stream = None
        return self._next(source, index)


class ExampleCache:
    """Encoded examples up to a number of bytes. Nothing is evicted: with passes over the data in
    random order, throwing out one example for another gains nothing."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._held: dict[Key, Any] = {}

    def get(self, key: Key) -> Any:
        return self._held.get(key)

    def put(self, key: Key, example: Any) -> None:
        size = 512 + sum(getattr(v, "nbytes", 8) for s in example.sequences for v in s.values())
        if self.used + size <= self.limit:
            self._held[key] = example
            self.used += size
