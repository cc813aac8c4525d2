"""Many series in one table: `id, timestamp, targets..., controls...`, as forecasters have it.

`read_panel` checks stamps, fills the grid (missing steps become NaN and are counted), and keeps
all series in one array, so windows over thousands of series are gathered without copying them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polytask.data.calendar import Frequency, infer, show
from polytask.errors import DataError, suggestion

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Panel:
    """Series on one frequency, stored end to end.

    `values` is (steps, channels) float32 with NaN where missing; series i has rows
    `starts[i]:starts[i + 1]`; its first stamp is `first[i]`. The first `targets` channels are
    forecast; the others are known in advance (holidays, prices, weather forecasts). `known[i]`
    steps at the end of series i have no target yet: they are the future of the controls.
    """

    values: Floats
    starts: NDArray[np.int64]
    ids: tuple[str, ...]
    channels: tuple[str, ...]
    targets: int
    first: NDArray[np.datetime64]
    frequency: Frequency
    known: NDArray[np.int64]
    missing: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    def series(self, index: int) -> Floats:
        """Values of one series, (steps, channels); a view, future controls included."""
        return self.values[self.starts[index] : self.starts[index + 1]]

    def history(self, index: int) -> Floats:
        """Values of one series up to its last step with a target; a view."""
        return self.values[self.starts[index] : self.starts[index + 1] - self.known[index]]

    def stamps(self, index: int) -> NDArray[np.datetime64]:
        """Stamps of one series, future controls included."""
        steps = int(self.starts[index + 1] - self.starts[index])
        return np.concatenate(
            [self.first[index : index + 1], self.frequency.after(self.first[index], steps - 1)]
        )


def read_panel(
    table: Any,
    *,
    timestamp: str,
    targets: Sequence[str],
    id: str | None = None,
    controls: Sequence[str] = (),
    frequency: str | None = None,
    name: str = "table",
) -> Panel:
    """A panel from a long table.

    Args:
        table: pandas, Polars or Arrow table, or a path to CSV, TSV, Parquet or JSONL.
        timestamp: column with stamps (dates, datetimes, or text that parses as such).
        targets: numeric columns to forecast.
        id: column that tells series apart; None for one series.
        controls: numeric columns known in advance. Rows without targets at the end of a series
            are its future.
        frequency: 'h', 'D', 'M' ...; inferred from the stamps when None.
        name: what messages call the table (a path names itself).

    Raises:
        DataError: a column is missing, a stamp does not parse, stamps repeat within a series or
            are irregular, a cell is not a number or is infinite, or nothing is left.
    """
    frame, name = _frame(table, name)
    wanted = [timestamp, *([id] if id else []), *targets, *controls]
    for column in wanted:
        if column not in frame.columns:
            raise DataError(
                f"{name}: column '{column}' is missing (has: {', '.join(map(str, frame.columns))})."
                f"{suggestion(column, map(str, frame.columns))}"
            )
    if not targets:
        raise DataError(f"{name}: name at least one target column")
    twice = {c for c in wanted if wanted.count(c) > 1}
    if twice:
        raise DataError(f"{name}: column '{twice.pop()}' has two roles")
    if not len(frame):
        raise DataError(f"{name} has no rows")
    stamps = _stamps(frame[timestamp], name, timestamp)
    channels = (*targets, *controls)
    values = np.stack([_numbers(frame[c], name, c) for c in channels], axis=1)
    keys = frame[id].astype(str).to_numpy() if id else np.full(len(frame), "series")
    return _assemble(name, keys, stamps, values, channels, len(targets), frequency)


def _assemble(
    name: str,
    keys: NDArray[Any],
    stamps: NDArray[np.datetime64],
    values: Floats,
    channels: tuple[str, ...],
    targets: int,
    frequency: str | None,
) -> Panel:
    ids, code = np.unique(keys, return_inverse=True)
    order = np.lexsort((stamps, code))
    code, stamps, values = code[order], stamps[order], values[order]
    same = (np.diff(code) == 0) & (np.diff(stamps.astype(np.int64)) == 0)
    if same.any():
        at = int(np.flatnonzero(same)[0])
        raise DataError(
            f"{name}: '{ids[code[at]]}' has two rows for {show(stamps[at])}. Aggregate them first"
        )
    bounds = np.flatnonzero(np.diff(code, prepend=-1, append=len(ids)))
    step = Frequency.named(frequency) if frequency else _infer(name, ids, bounds, stamps)
    blocks, lengths = [], []
    for i in range(len(ids)):  # one pass over series, never over rows
        part = slice(bounds[i], bounds[i + 1])
        try:
            places = step.positions(stamps[part])
        except DataError as error:
            raise DataError(f"{name}, series '{ids[i]}': {error}") from error
        block = np.full((int(places[-1]) + 1, values.shape[1]), np.nan, dtype=np.float32)
        block[places] = values[part]
        blocks.append(block)
        lengths.append(len(block))
    filled = np.concatenate(blocks)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    known = np.array([_future_steps(b, targets) for b in blocks])
    for empty in np.flatnonzero(known == np.array(lengths)):
        raise DataError(f"{name}: series '{ids[empty]}' has no target value at all")
    return Panel(
        values=filled,
        starts=starts.astype(np.int64),
        ids=tuple(map(str, ids)),
        channels=channels,
        targets=targets,
        first=stamps[bounds[:-1]].astype("datetime64[s]"),
        frequency=step,
        known=known.astype(np.int64),
        missing=len(filled) - len(values),
    )


def _infer(
    name: str, ids: NDArray[Any], bounds: NDArray[np.int64], stamps: NDArray[np.datetime64]
) -> Frequency:
    """The step of the longest series; the others are checked against it."""
    longest = int(np.diff(bounds).argmax())
    try:
        return infer(stamps[bounds[longest] : bounds[longest + 1]])
    except DataError as error:
        raise DataError(f"{name}, series '{ids[longest]}': {error}") from error


def _future_steps(block: Floats, targets: int) -> int:
    """Steps after the last one with any target value."""
    seen = np.flatnonzero(np.isfinite(block[:, :targets]).any(1))
    return len(block) - (int(seen[-1]) + 1 if seen.size else 0)


def read_columns(path: Path) -> list[str]:
    """Names of a file's columns, in order."""
    return [str(column) for column in _frame(path, path.name)[0].columns]


def _frame(table: Any, name: str) -> tuple[Any, str]:
    import pandas as pd

    if isinstance(table, str | Path):
        path = Path(table)
        if not path.is_file():
            raise DataError(f"there is no file {path}")
        readers: dict[str, Any] = {
            ".csv": pd.read_csv,
            ".tsv": lambda p: pd.read_csv(p, sep="\t"),
            ".parquet": pd.read_parquet,
            ".jsonl": lambda p: pd.read_json(p, lines=True),
        }
        if path.suffix not in readers:
            raise DataError(f"{path}: give a .csv, .tsv, .jsonl or .parquet file")
        try:
            return readers[path.suffix](path), path.name
        except ValueError as error:
            raise DataError(f"{path} cannot be read: {error}") from error
    if isinstance(table, pd.DataFrame):
        return table, name
    if hasattr(table, "to_pandas"):  # Arrow and Polars
        return table.to_pandas(), name
    if hasattr(table, "__arrow_c_stream__"):  # DuckDB and whoever else speaks Arrow
        import pyarrow as pa

        return pa.table(table).to_pandas(), name
    if hasattr(table, "collect"):
        raise DataError(f"{name}: a lazy table has no rows yet; give what its collect() returns")
    raise DataError(f"{name}: expected a pandas, Polars or Arrow table, not {type(table).__name__}")


def _stamps(column: Any, name: str, label: str) -> NDArray[np.datetime64]:
    import pandas as pd

    if pd.api.types.is_numeric_dtype(column):
        raise DataError(
            f"{name}: column '{label}' holds numbers, not timestamps; convert it to dates first"
        )
    parsed = pd.to_datetime(column, errors="coerce", format="mixed", utc=True)
    bad = np.flatnonzero(parsed.isna().to_numpy())
    if bad.size:
        raise DataError(
            f"{name}, row {bad[0] + 1}: '{column.iloc[bad[0]]}' in column '{label}' is not a "
            "timestamp"
        )
    return np.asarray(parsed.dt.tz_localize(None).to_numpy().astype("datetime64[s]"))


def _numbers(column: Any, name: str, label: str) -> Floats:
    import pandas as pd

    numbers = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    given = column.notna().to_numpy()
    bad = np.flatnonzero((given & np.isnan(numbers)) | np.isinf(numbers))
    if bad.size:
        raise DataError(
            f"{name}, row {bad[0] + 1}: '{column.iloc[bad[0]]}' in column '{label}' is not a "
            "finite number"
        )
    return np.asarray(numbers, dtype=np.float32)
