"""Sources one after the other, as one."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, Protocol, cast

from polytask.data.columns import column
from polytask.data.rows import Row, RowSource, StreamSource


class CountedStream(StreamSource, Protocol):
    """A stream that can say how many rows it has; reading to the end once may be needed."""

    def count(self) -> int: ...


def concat(parts: Sequence[RowSource | StreamSource], name: str) -> RowSource | StreamSource:
    """One source; columns that a part lacks are None in its rows."""
    if len(parts) == 1:
        return parts[0]
    if all(isinstance(part, RowSource) for part in parts):
        return ConcatRows(cast(Sequence[RowSource], parts), name)
    return ConcatStream(cast(Sequence[CountedStream], parts), name)


class ConcatRows:
    """Map-style sources, one after the other."""

    def __init__(self, parts: Sequence[RowSource], name: str) -> None:
        self.parts = tuple(parts)
        self.name = name
        self.columns = _union(parts)
        self._firsts = [0, *accumulate(len(part) for part in parts)]

    def __len__(self) -> int:
        return self._firsts[-1]

    def __getitem__(self, index: int) -> Row:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} rows, not {index}")
        return self.take([index % len(self)])[0]

    def take(self, indices: Sequence[int]) -> list[Row]:
        wanted: dict[int, list[tuple[int, int]]] = {}
        for place, index in enumerate(indices):
            part = bisect_right(self._firsts, index) - 1
            wanted.setdefault(part, []).append((place, int(index) - self._firsts[part]))
        rows: list[Row] = [{}] * len(indices)
        for number, members in wanted.items():
            source = self.parts[number]
            taken = source.take([inner for _, inner in members])
            for (place, _), row in zip(members, _completed(taken, source.columns, self.columns)):
                rows[place] = row
        return rows

    def column(self, name: str) -> list[Any]:
        cells: list[Any] = []
        for part in self.parts:
            cells += column(part, name) if name in part.columns else [None] * len(part)
        return cells

    def where(self, index: int) -> str:
        part = bisect_right(self._firsts, index) - 1
        return self.parts[part].where(index - self._firsts[part])


class ConcatStream:
    """Streams, one after the other."""

    def __init__(self, parts: Sequence[CountedStream], name: str) -> None:
        self.parts = tuple(parts)
        self.name = name
        self.columns = _union(parts)

    def read_from(self, position: int) -> Iterator[Row]:
        for part in self.parts:
            if position and position >= (size := part.count()):
                position -= size
                continue
            yield from _completed(part.read_from(position), part.columns, self.columns)
            position = 0

    def count(self) -> int:
        return sum(part.count() for part in self.parts)

    def where(self, index: int) -> str:
        for part in self.parts:
            if index < (size := part.count()):
                return part.where(index)
            index -= size
        raise IndexError(f"{self.name} has {self.count()} rows")


def _union(parts: Sequence[RowSource | StreamSource]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for part in parts for name in part.columns))


def _completed(
    rows: Iterator[Row] | list[Row], has: tuple[str, ...], wanted: tuple[str, ...]
) -> Iterator[Row]:
    if has == wanted:
        yield from rows
    else:
        for row in rows:
            yield {name: row.get(name) for name in wanted}
