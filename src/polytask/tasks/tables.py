"""Table columns: numbers standardised by the train split, categories as global ids.

Ids are global over the tasks of a run, so that one embedding serves every table: each number
column has an id of its own, each category column a block of ids that begins with 'unknown' and
'missing'.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from polytask.tasks.schemas import brief, is_missing, label_key

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]

UNKNOWN, MISSING = 0, 1


@dataclass(frozen=True)
class NumberColumn:
    """Mean and deviation over the train split's present cells."""

    name: str
    id: int
    mean: float
    std: float


@dataclass(frozen=True)
class CategoryColumn:
    """Values seen in training; value k has global id `first` + 2 + k."""

    name: str
    first: int
    values: tuple[str, ...]

    @property
    def size(self) -> int:
        return len(self.values) + 2


@dataclass(frozen=True)
class TableCodec:
    """The columns of one table, in two kinds."""

    numbers: tuple[NumberColumn, ...]
    categories: tuple[CategoryColumn, ...]
    _lookup: dict[str, dict[str, int]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        for column in self.categories:
            self._lookup[column.name] = {
                value: column.first + 2 + k for k, value in enumerate(column.values)
            }

    def encode_numbers(self, rows: Sequence[Mapping[str, Any]]) -> Floats:
        """(rows, number columns) float32 standardised; NaN where missing."""
        out = np.empty((len(rows), len(self.numbers)), np.float32)
        for k, column in enumerate(self.numbers):
            raw = np.array([as_number(row[column.name]) for row in rows], np.float64)
            out[:, k] = (raw - column.mean) / column.std
        return out

    def encode_categories(self, rows: Sequence[Mapping[str, Any]]) -> Ints:
        """(rows, category columns) int32 global ids."""
        out = np.empty((len(rows), len(self.categories)), np.int32)
        for k, column in enumerate(self.categories):
            known, first = self._lookup[column.name], column.first
            out[:, k] = [
                first + MISSING
                if is_missing(row[column.name])
                else known.get(label_key(row[column.name]), first + UNKNOWN)
                for row in rows
            ]
        return out

    def to_json(self) -> dict[str, Any]:
        return {
            "numbers": [[c.name, c.id, c.mean, c.std] for c in self.numbers],
            "categories": [[c.name, c.first, list(c.values)] for c in self.categories],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TableCodec:
        return cls(
            tuple(NumberColumn(*item) for item in data["numbers"]),
            tuple(CategoryColumn(n, first, tuple(v)) for n, first, v in data["categories"]),
        )


def as_number(value: Any) -> float:
    """A cell as a float, NaN where missing; `ValueError` when it is no finite number."""
    if is_missing(value):
        return math.nan
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{brief(value)} is not a number") from None
    if math.isinf(number):
        raise ValueError("the number is infinite")
    return number


def is_numeric(values: Iterable[Any]) -> bool:
    """Whether every present value is a number or reads as one, and one is present."""
    seen = False
    for value in values:
        if is_missing(value):
            continue
        if isinstance(value, bool | np.bool_):
            return False
        try:
            float(value)
        except (TypeError, ValueError):
            return False
        seen = True
    return seen


@dataclass
class TableFitter:
    """Hands out ids over all tables of a run."""

    max_categories: int
    next_number: int = 0
    next_category: int = 0

    def fit(
        self, rows: Sequence[Mapping[str, Any]], columns: Sequence[str], categories: Sequence[str]
    ) -> TableCodec:
        """Statistics of a table's train rows; columns in `categories` are never numbers."""
        number_columns, category_columns = [], []
        for name in columns:
            values = [row[name] for row in rows]
            if name not in categories and is_numeric(values):
                number_columns.append(self._number(name, values))
            else:
                category_columns.append(self._category(name, values))
        return TableCodec(tuple(number_columns), tuple(category_columns))

    def _number(self, name: str, values: Sequence[Any]) -> NumberColumn:
        raw = np.array([as_number(value) for value in values], np.float64)
        present = raw[~np.isnan(raw)]
        mean, deviation = float(present.mean()), float(present.std())
        constant = deviation <= 1e-9 * max(1.0, abs(mean))  # rounding noise is no scale
        column = NumberColumn(name, self.next_number, mean, 1.0 if constant else deviation)
        self.next_number += 1
        return column

    def _category(self, name: str, values: Sequence[Any]) -> CategoryColumn:
        counts = Counter(label_key(value) for value in values if not is_missing(value))
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        kept = tuple(sorted(value for value, _ in ranked[: self.max_categories]))
        column = CategoryColumn(name, self.next_category, kept)
        self.next_category += column.size
        return column
