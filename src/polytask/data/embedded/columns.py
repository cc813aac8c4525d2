"""`ColumnRows`: a RowSource over columns held as arrays and lists, for data that fit in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from polytask.data.rows import Row


class Ragged(Sequence[np.ndarray]):
    """1-D arrays of different lengths held as one array of values and (rows + 1,) offsets."""

    def __init__(self, values: np.ndarray, offsets: np.ndarray) -> None:
        self.values = values
        self.offsets = offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.values[self.offsets[index] : self.offsets[index + 1]]


class ColumnRows:
    """Rows over columns of equal length.

    `data` maps a column to an array (first axis = row; 1-D arrays give Python scalars), a
    `Ragged`, a pyarrow column or a list.
    """

    def __init__(self, data: Mapping[str, Any], name: str) -> None:
        self.data = data
        self.name = name
        self.columns: tuple[str, ...] = tuple(data)
        self._cells: dict[str, Sequence[Any]] = {}

    def __len__(self) -> int:
        return len(next(iter(self.data.values()), ()))

    def __getitem__(self, index: int) -> Row:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} rows, not row {index}")
        return {column: self.cells(column)[index] for column in self.data}

    def take(self, indices: Sequence[int]) -> list[Row]:
        columns = [(column, self.cells(column)) for column in self.columns]
        return [{column: cells[i] for column, cells in columns} for i in indices]

    def where(self, index: int) -> str:
        return f"{self.name}, row {index + 1}"

    def cells(self, column: str) -> Sequence[Any]:
        """The cells of a column, scalars as plain Python values."""
        if column not in self._cells:
            value = self.data[column]
            if isinstance(value, np.ndarray):
                value = value.tolist() if value.ndim == 1 else value
            elif hasattr(value, "to_pylist"):
                value = value.to_pylist()
            self._cells[column] = value
        return self._cells[column]
