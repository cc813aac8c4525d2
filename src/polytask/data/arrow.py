"""`ArrowRows`: an Arrow table as a `RowSource`, with fast random access."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc

from polytask.data import cells
from polytask.data.problems import MAX_CELL, RowProblems
from polytask.data.rows import Row
from polytask.errors import DataError


class ArrowRows:
    """Rows of a table, in memory or memory-mapped.

    `take` gathers each column once; text is str, numbers int, float or None, lists of floats
    arrays. `problems` says what was left out when the table was read.
    """

    def __init__(
        self,
        table: pa.Table,
        name: str,
        where: Callable[[int], str] | None = None,
        problems: RowProblems | None = None,
    ) -> None:
        self.table = table
        self.name = name
        self.columns: tuple[str, ...] = tuple(table.column_names)
        self.problems = problems or RowProblems(name)
        self._where = where

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, index: int) -> Row:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} rows, not {index}")
        return cells.rows_of(self.table.slice(index % len(self), 1))[0]

    def take(self, indices: Sequence[int]) -> list[Row]:
        return [*cells.rows_of(self.table.take(pa.array(np.asarray(indices, dtype=np.int64))))]

    def column(self, name: str) -> list[Any]:
        """All cells of one column."""
        return cells.python_cells(self.table[name])

    def where(self, index: int) -> str:
        return self._where(index) if self._where else f"{self.name}, row {index + 1}"

    @classmethod
    def open(cls, path: Path, max_bad: float = 0.01) -> ArrowRows:
        """Memory-map an Arrow IPC file or stream (`.arrow`, `.feather`)."""
        try:
            source = pa.memory_map(str(path))
            try:
                table = pa.ipc.open_file(source).read_all()
            except pa.ArrowInvalid:
                source.seek(0)
                table = pa.ipc.open_stream(source).read_all()
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{path} is not a whole Arrow file: {error}") from error
        return check_table(table, path, path.name, max_bad)


def check_table(table: pa.Table, path: Path, name: str, max_bad: float) -> ArrowRows:
    """Rows of a typed table, without those that are empty or hold a cell of more than 10 MB."""
    check_header(table.column_names, str(path))
    check_text(table, path)
    problems = RowProblems(name, max_bad)
    bad = bad_rows(table)
    for row, reason in bad.items():
        problems.add(f"{path}, row {row + 1}", reason)
    problems.conclude(len(table) - len(bad))
    kept = np.delete(np.arange(len(table)), list(bad)) if bad else None
    if kept is not None:
        table = table.take(pa.array(kept))
    return ArrowRows(table, name, _RowNumbers(path, kept), problems)


@dataclass(frozen=True)
class _RowNumbers:
    path: Path
    kept: npt.NDArray[np.int64] | None

    def __call__(self, index: int) -> str:
        return f"{self.path}, row {(index if self.kept is None else int(self.kept[index])) + 1}"


def check_header(names: Sequence[str], where: str) -> None:
    """`DataError` for a column name that is given twice, or no columns."""
    if not names:
        raise DataError(f"{where} has no columns")
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        listed = ", ".join(f"'{name}'" for name in twice)
        raise DataError(f"{where}: column {listed} appears more than once in the header; rename it")


def check_text(table: pa.Table, path: Path) -> None:
    """`DataError` for text that is not UTF-8, which only a broken writer puts into Arrow."""
    for name, column in zip(table.column_names, table.columns):
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            try:
                column.validate(full=True)
            except pa.ArrowInvalid as error:
                raise DataError(f"{path}: column '{name}' holds broken text: {error}") from error


def bad_rows(table: pa.Table) -> dict[int, str]:
    """Row -> reason, for rows without any cell and rows with a cell that is too large."""
    bad: dict[int, str] = {}
    for name, column in zip(table.column_names, table.columns):
        kind = column.type
        if pa.types.is_string(kind) or pa.types.is_binary(kind) or pa.types.is_large_string(kind):
            large = too_large(column)
            bad |= {int(row): f"the cell '{name}' holds more than 10 MB" for row in large}
    if all(column.null_count for column in table.columns):
        empty = np.ones(len(table), bool)
        for column in table.columns:
            empty &= pc.is_null(column).to_numpy()
        bad |= {int(row): "the row is empty" for row in np.flatnonzero(empty)}
    return dict(sorted(bad.items()))


def too_large(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """Rows whose cell in a text or binary column is larger than 10 MB."""
    if column.nbytes <= MAX_CELL:
        return np.empty(0, np.int64)
    lengths = pc.fill_null(pc.binary_length(column), 0)
    if pc.max(lengths).as_py() <= MAX_CELL:
        return np.empty(0, np.int64)
    return np.flatnonzero(lengths.to_numpy() > MAX_CELL)
