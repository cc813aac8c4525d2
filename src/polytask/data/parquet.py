"""Parquet files: in memory as Arrow, or streamed by row groups.

A stream skips a row group without reading it when the file's statistics prove that all its rows
are usable, so a position deep in a large file costs one row group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from polytask.data.arrow import ArrowRows, bad_rows, check_header, check_table, check_text
from polytask.data.cells import rows_of
from polytask.data.problems import MAX_CELL
from polytask.data.records import Ints
from polytask.data.rows import Row
from polytask.data.stream import ChunkStream
from polytask.errors import DataError


def read_parquet(path: Path, max_bad: float = 0.01) -> ArrowRows:
    """All rows of a file."""
    with _readable(path):
        table = pyarrow.parquet.ParquetFile(path, memory_map=True).read().combine_chunks()
    return check_table(table, path, path.name, max_bad)


def stream_parquet(path: Path, max_bad: float = 0.01) -> ChunkStream:
    """Rows in order, one row group in memory at a time."""
    with _readable(path):
        file = pyarrow.parquet.ParquetFile(path, memory_map=True)
    check_header(file.schema_arrow.names, str(path))
    reader = _GroupReader(path, file)
    return ChunkStream(path.name, tuple(file.schema_arrow.names), reader, max_bad)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise DataError(f"{path} is not a whole Parquet file: {error}") from error


@dataclass(frozen=True)
class _GroupReader:
    path: Path
    file: pyarrow.parquet.ParquetFile

    def chunks(self, mark: tuple[int, ...] | None) -> Iterator[_Group]:
        number, row = mark if mark is not None else (0, 0)
        for group in range(number, self.file.metadata.num_row_groups):
            yield _Group(self.path, self.file, group, row)
            row += self.file.metadata.row_group(group).num_rows


@dataclass(frozen=True)
class _Group:
    path: Path
    file: pyarrow.parquet.ParquetFile
    number: int
    first_row: int  # of the file, bad rows counted

    @property
    def mark(self) -> tuple[int, ...]:
        return (self.number, self.first_row)

    @cached_property
    def _surely_good(self) -> bool:
        """No column is large enough to hold a cell that is too large, and one has no gaps."""
        group = self.file.metadata.row_group(self.number)
        columns = [group.column(i) for i in range(group.num_columns)]
        small = all(column.total_uncompressed_size <= MAX_CELL for column in columns)
        return small and any(
            column.statistics is not None
            and column.statistics.has_null_count
            and column.statistics.null_count == 0
            for column in columns
        )

    @cached_property
    def _table(self) -> pa.Table:
        with _readable(self.path):
            table = self.file.read_row_group(self.number)
        check_text(table, self.path)
        return table

    @cached_property
    def _bad(self) -> dict[int, str]:
        return {} if self._surely_good else bad_rows(self._table)

    @cached_property
    def _kept(self) -> Ints:
        rows = self.file.metadata.row_group(self.number).num_rows
        return np.delete(np.arange(rows), list(self._bad))

    def __len__(self) -> int:
        return int(self.file.metadata.row_group(self.number).num_rows) - len(self._bad)

    def rows(self, start: int, stop: int) -> Sequence[Row]:
        if not self._bad:
            return rows_of(self._table.slice(start, stop - start))
        return rows_of(self._table.take(pa.array(self._kept[start:stop])))

    def where(self, index: int) -> str:
        return f"{self.path}, row {self.first_row + int(self._kept[index]) + 1}"

    def problems(self) -> Sequence[tuple[str, str, int]]:
        return [
            (f"{self.path}, row {self.first_row + row + 1}", reason, 1)
            for row, reason in self._bad.items()
        ]
