"""From a table with one row per moment to one row per series, or per window of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

import numpy as np

from polytask.data.columns import column, require_columns
from polytask.data.problems import RowProblems
from polytask.data.rows import MemoryRows, RowSource
from polytask.data.spec import SeriesSpec
from polytask.errors import DataError

_FORMATS = ("%Y/%m/%d", "%d.%m.%Y", "%d/%m/%Y", "%m/%d/%Y", "%Y-%m", "%d-%m-%Y", "%m-%d-%Y")
_CLOCKS = ("", " %H:%M", " %H:%M:%S")


@dataclass(frozen=True)
class SeriesRows(MemoryRows):
    """Rows with 'series' (length, channels) float32; `where` says which series and moments."""

    places: Sequence[str] = ()
    problems: RowProblems | None = None

    def where(self, index: int) -> str:
        return self.places[index]


def series_rows(source: RowSource, spec: SeriesSpec, max_bad: float = 0.01) -> SeriesRows:
    """Sort by time, gather by series, cut windows.

    A row without a readable moment, or with one that its series has already, is a bad row.
    `DataError` when a value column does not hold numbers.
    """
    by = [] if spec.by is None else [spec.by]
    require_columns(source, [spec.time, *spec.values, *by], "series")
    problems = RowProblems(source.name, max_bad)
    values = np.stack([_numbers(source, name) for name in spec.values], axis=1)
    moments = parse_times(column(source, spec.time), f"column '{spec.time}' of {source.name}")
    names = column(source, spec.by) if spec.by is not None else [None] * len(source)
    members: dict[Any, dict[float, int]] = {}
    for row, (name, moment) in enumerate(zip(names, moments)):
        if moment is None:
            problems.add(source.where(row), f"no moment can be read in column '{spec.time}'")
        elif moment in (seen := members.setdefault(name, {})):
            first = source.where(seen[moment])
            problems.add(source.where(row), f"its moment is there already ({first})")
        else:
            seen[moment] = row
    problems.conclude(len(source) - problems.bad)
    rows: list[dict[str, Any]] = []
    places = []
    times = column(source, spec.time)
    for name, seen in members.items():
        order = [seen[moment] for moment in sorted(seen)]
        for start, stop in _windows(len(order), spec):
            piece = order[start:stop]
            made = {"series": values[piece], "start": times[piece[0]], "time": times[piece[-1]]}
            rows.append(made if spec.by is None else {spec.by: name, **made})
            label = source.name if name is None else f"{source.name}, series '{name}'"
            places.append(f"{label}, {times[piece[0]]} to {times[piece[-1]]}")
    if not rows:
        raise DataError(f"{source.name}: no series is as long as the window of {spec.window}")
    return SeriesRows(rows, source.name, places, problems)


def _windows(length: int, spec: SeriesSpec) -> list[tuple[int, int]]:
    """(start, stop) of each window, the last one at the end of the series."""
    if spec.window is None:
        return [(0, length)]
    stride = spec.stride or spec.window
    return [(stop - spec.window, stop) for stop in range(length, spec.window - 1, -stride)][::-1]


def _numbers(source: RowSource, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    cells = column(source, name)
    for row, cell in enumerate(cells):
        if isinstance(cell, str):
            raise DataError(
                f"{source.where(row)}: '{cell[:40]}' in column '{name}' is not a number, "
                "and series are made of numbers"
            )
    return np.array([math.nan if cell is None else cell for cell in cells], dtype=np.float32)


def parse_times(cells: Sequence[Any], what: str) -> list[float | None]:
    """Moments as seconds since 1970 (numbers stay as they are); None where unreadable.

    Text may be ISO 8601 or one of a few common forms, the same in the whole column. `DataError`
    when day and month cannot be told apart.
    """
    texts = [cell for cell in cells if isinstance(cell, str) and cell.strip()]
    if not texts:
        return [_moment(cell, datetime.fromisoformat) for cell in cells]
    readers = [reader for reader in _readers() if _reads_most(reader, texts)]
    if not readers:
        return [None] * len(cells)
    found = [[_moment(cell, reader) for cell in cells] for reader in readers]
    if len(found) > 1 and found[0] != found[1]:
        raise DataError(
            f"{what}: '{texts[0]}' may be day first or month first; write dates as YYYY-MM-DD"
        )
    return found[0]


Reader = Callable[[str], datetime]


def _readers() -> list[Reader]:
    def by_format(form: str) -> Reader:
        return lambda text: datetime.strptime(text, form)

    forms = [day + clock for day in _FORMATS for clock in _CLOCKS]
    return [datetime.fromisoformat, *map(by_format, forms)]


def _reads_most(reader: Reader, texts: Sequence[str]) -> bool:
    sample = texts[:: max(len(texts) // 200, 1)]
    return sum(_moment(text, reader) is not None for text in sample) > len(sample) / 2


def _moment(cell: Any, reader: Reader) -> float | None:
    if isinstance(cell, bool) or cell is None:
        return None
    if isinstance(cell, int | float):
        return float(cell) if math.isfinite(cell) else None
    if isinstance(cell, str):
        try:
            cell = reader(cell.strip())
        except ValueError:
            return None
    if isinstance(cell, date) and not isinstance(cell, datetime):
        cell = datetime(cell.year, cell.month, cell.day)
    if not isinstance(cell, datetime):
        return None
    moment = cell if cell.tzinfo else cell.replace(tzinfo=UTC)
    return moment.timestamp()
