"""Forecasting windows cut from long series: every row of the source is one series.

A window is `context` steps of past and `horizon` steps of future. The last steps of every series
are test, those before valid, so no model is judged on a future that it was trained on; the past
of a judged window may reach back into training steps, as it does when a forecast is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from polytask.data.rows import Row, RowSource
from polytask.errors import TaskError
from polytask.tasks.arrays import series_values
from polytask.tasks.fit import chunks
from polytask.tasks.plan import Draft
from polytask.tasks.schemas import Forecasting
from polytask.tasks.sources import WHOLE
from polytask.tasks.splits import SPLITS, round_at_least_one

FUTURE = "future"
CONTEXT = 72  # steps of past, where 'context' is left out
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class WindowRows:
    """Windows as rows: the series columns hold the past, `future` the future, both
    (steps, channels) float32; other columns are the series' own."""

    source: RowSource
    series_columns: tuple[str, ...]
    widths: tuple[int, ...]  # channels of each series column
    values: Sequence[Floats] = field(repr=False)  # (steps, channels) of every row of the source
    owner: Ints = field(repr=False)  # (windows,) row of the source
    cut: Ints = field(repr=False)  # (windows,) first step of the future
    context: int
    horizon: int
    future: str = FUTURE

    @property
    def name(self) -> str:
        return self.source.name

    @cached_property
    def columns(self) -> tuple[str, ...]:
        return (*(c for c in self.source.columns if c != self.future), self.future)

    def __len__(self) -> int:
        return len(self.owner)

    def __getitem__(self, index: int) -> Row:
        return self.take([index])[0]

    def take(self, indices: Sequence[int]) -> list[Row]:
        places = np.asarray(indices, np.int64)
        owners, which = np.unique(self.owner[places], return_inverse=True)
        rows = self.source.take(owners.tolist())
        return [
            self._window(rows[k], int(self.owner[place]), int(self.cut[place]))
            for place, k in zip(places, which, strict=True)
        ]

    def _window(self, row: Row, owner: int, cut: int) -> Row:
        values = self.values[owner]
        past = values[max(0, cut - self.context) : cut]
        pieces = np.split(past, np.cumsum(self.widths)[:-1], axis=1)
        return {
            **row,
            **dict(zip(self.series_columns, pieces, strict=True)),
            self.future: values[cut : cut + self.horizon],
        }

    def where(self, index: int) -> str:
        cut = int(self.cut[index])
        return f"{self.source.where(int(self.owner[index]))}, steps {cut} to {cut + self.horizon}"


def cut_windows(
    source: RowSource,
    columns: tuple[str, ...],
    *,
    horizon: int,
    context: int,
    stride: int,
    valid: float,
    test: float,
    what: str,
) -> dict[str, WindowRows]:
    """Windows per split. A series too short for any training window gives none; `TaskError` when
    that leaves no training window at all.

    The shares `valid` and `test` are of each series' steps, at least one horizon where above 0.
    Judged windows do not overlap; training windows start `stride` steps apart and have at least
    as many steps of past as of future (or `context`, if that is fewer).
    """
    owners: dict[str, list[Ints]] = {name: [] for name in SPLITS}
    cuts: dict[str, list[Ints]] = {name: [] for name in SPLITS}
    widths, values = _read(source, columns)
    for number, series in enumerate(values):
        found = _starts(len(series), horizon, min(context, horizon), stride, valid, test)
        for name, starts in found.items():
            kept = starts[_observed(series, starts, context, horizon)]
            owners[name].append(np.full(len(kept), number, np.int64))
            cuts[name].append(kept)
    result = {
        name: WindowRows(
            source,
            columns,
            widths,
            values,
            np.concatenate([np.zeros(0, np.int64), *owners[name]]),
            np.concatenate([np.zeros(0, np.int64), *cuts[name]]),
            context,
            horizon,
        )
        for name in SPLITS
    }
    if not len(result["train"]):
        longest = max(map(len, values), default=0)
        raise TaskError(
            f"{what}: no series of {source.name} is long enough (the longest has {longest} steps) "
            f"for a horizon of {horizon} in training beside valid and test; "
            "lower horizon, valid or test"
        )
    return {name: rows for name, rows in result.items() if len(rows)}


def last_windows(
    source: RowSource, columns: tuple[str, ...], *, horizon: int, context: int, what: str
) -> WindowRows:
    """The last window of every series: how given valid and test series are judged."""
    widths, values = _read(source, columns)
    cut = np.array([len(series) for series in values], np.int64) - horizon
    owner = np.flatnonzero(cut >= 1)
    if not len(owner):
        raise TaskError(
            f"{what}: no series of {source.name} is longer than the horizon of {horizon} steps"
        )
    return WindowRows(source, columns, widths, values, owner, cut[owner], context, horizon)


def _read(source: RowSource, columns: tuple[str, ...]) -> tuple[tuple[int, ...], list[Floats]]:
    """Channels per column, and all series as (steps, channels) float32."""
    values: list[Floats] = []
    widths: tuple[int, ...] = (1,) * len(columns)
    for start, rows in chunks(source):
        if start == 0:
            widths = tuple(series_values(rows[0], (column,)).shape[1] for column in columns)
        values += [series_values(row, columns) for row in rows]
    return widths, values


def _observed(values: Floats, starts: Ints, context: int, horizon: int) -> npt.NDArray[np.bool_]:
    """Which windows have a known value both in their past and in their future."""
    known = np.r_[0, np.cumsum(np.isfinite(values).any(1))]
    past = known[starts] - known[np.maximum(starts - context, 0)]
    future = known[starts + horizon] - known[starts]
    return np.asarray((past > 0) & (future > 0), bool)


def _starts(
    steps: int, horizon: int, shortest: int, stride: int, valid: float, test: float
) -> dict[str, Ints]:
    """First steps of the futures of one series, per split."""

    def held(share: float) -> int:
        wanted = round_at_least_one(steps * share, share, steps)
        return max(wanted, horizon) if share > 0 else 0

    end_valid = steps - held(test)
    end_train = end_valid - held(valid)

    def judged(start: int, stop: int) -> Ints:
        first = max(start, 1)
        return np.arange(first, stop - horizon + 1, horizon, dtype=np.int64)

    return {
        "train": np.arange(shortest, end_train - horizon + 1, stride, dtype=np.int64),
        "valid": judged(end_train, end_valid),
        "test": judged(end_valid, steps),
    }


def window_splits(
    draft: Draft, views: Mapping[str, RowSource]
) -> tuple[dict[str, WindowRows], Forecasting]:
    """Windows per split of a draft without a target column, and its schema."""
    config = draft.config
    columns = next(f for f in draft.fields if f.modality == "series").columns
    if config.horizon is None:
        raise TaskError(f"{draft.what}: forecasting without a target column needs 'horizon'")
    if config.split.kind not in (None, "time", "given"):
        raise TaskError(
            f"{draft.what}: windows of long series are split by time, not by '{config.split.kind}'"
        )
    horizon, context = config.horizon, config.context or CONTEXT
    whole = WHOLE in views
    parts = cut_windows(
        views[WHOLE if whole else "train"],
        columns,
        horizon=horizon,
        context=context,
        stride=config.stride,
        valid=config.split.valid if "valid" not in views else 0.0,
        test=config.split.test if "test" not in views else 0.0,
        what=draft.what,
    )
    for name in ("valid", "test"):
        if name in views:
            parts[name] = last_windows(
                views[name], columns, horizon=horizon, context=context, what=draft.what
            )
    channels = parts["train"][0][FUTURE].shape[1]
    return parts, Forecasting(horizon, channels)
