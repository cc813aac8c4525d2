"""Rows and where they come from: the one interface between users' files and tasks.

A map-style `RowSource` has a length and random access; a `StreamSource` is read in order and can
start at any position. Both say where a row stands (`where`), so errors can name file and line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

Row = Mapping[str, Any]


@runtime_checkable
class RowSource(Protocol):
    """Random access to rows."""

    @property
    def name(self) -> str: ...
    @property
    def columns(self) -> tuple[str, ...]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Row: ...

    def take(self, indices: Sequence[int]) -> list[Row]:
        """Rows at `indices`, in that order; faster than one by one."""

    def where(self, index: int) -> str:
        """Where a row stands, for people: 'reviews.csv, line 18'."""


@runtime_checkable
class StreamSource(Protocol):
    """Rows in order, too many to hold; a position is the number of rows before it."""

    @property
    def name(self) -> str: ...
    @property
    def columns(self) -> tuple[str, ...]: ...
    def read_from(self, position: int) -> Iterator[Row]:
        """Rows from `position` on."""

    def where(self, index: int) -> str: ...


@dataclass(frozen=True)
class MemoryRows:
    """Rows held in a list. All rows have the columns of the first."""

    rows: Sequence[Row]
    name: str = "memory"

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self.rows[0]) if self.rows else ()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    def take(self, indices: Sequence[int]) -> list[Row]:
        return [self.rows[i] for i in indices]

    def where(self, index: int) -> str:
        return f"{self.name}, row {index + 1}"


@dataclass(frozen=True)
class View:
    """Some rows of another source, by index: what a split is."""

    source: RowSource
    indices: Sequence[int] | npt.NDArray[np.int64]

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def columns(self) -> tuple[str, ...]:
        return self.source.columns

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Row:
        return self.source[int(self.indices[index])]

    def take(self, indices: Sequence[int]) -> list[Row]:
        return self.source.take([int(self.indices[i]) for i in indices])

    def where(self, index: int) -> str:
        return self.source.where(int(self.indices[index]))
