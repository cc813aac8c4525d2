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
from polytask.tasks.plan import Draft
from polytask.tasks.schemas import Forecasting
from polytask.tasks.sources import WHOLE
from polytask.tasks.splits import SPLITS, round_at_least_one

FUTURE = "future"
CONTEXT = 72  # steps of past, where 'context' is left out
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class WindowRows:
    """Windows as rows: the series columns hold the past, `future` the future, both
    (steps, channels) float32; other columns are the series' own."""

    source: RowSource
    series_columns: tuple[str, ...]
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
        values = [series_values(row, self.series_columns) for row in rows]
        return [
            self._window(rows[k], values[k], int(self.cut[place]))
            for place, k in zip(places, which, strict=True)
        ]

    def _window(self, row: Row, values: npt.NDArray[np.float32], cut: int) -> Row:
        past = values[max(0, cut - self.context) : cut]
        first, *others = self.series_columns
        # The past of all channels stands in the first column; the others are left out of it.
        return {
            **{k: v for k, v in row.items() if k not in others},
            first: past,
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
    one step of past.
    """
    owners: dict[str, list[Ints]] = {name: [] for name in SPLITS}
    cuts: dict[str, list[Ints]] = {name: [] for name in SPLITS}
    longest = 0
    for number in range(len(source)):
        values = series_values(source[number], columns)
        longest = max(longest, values.shape[0])
        for name, starts in _starts(values.shape[0], horizon, stride, valid, test).items():
            kept = starts[_observed(values, starts, context, horizon)]
            owners[name].append(np.full(len(kept), number, np.int64))
            cuts[name].append(kept)
    result = {
        name: WindowRows(
            source,
            columns,
            np.concatenate([np.zeros(0, np.int64), *owners[name]]),
            np.concatenate([np.zeros(0, np.int64), *cuts[name]]),
            context,
            horizon,
        )
        for name in SPLITS
    }
    if not len(result["train"]):
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
    steps = [series_values(source[number], columns).shape[0] for number in range(len(source))]
    cut = np.array(steps, np.int64) - horizon
    owner = np.flatnonzero(cut >= 1)
    if not len(owner):
        raise TaskError(
            f"{what}: no series of {source.name} is longer than the horizon of {horizon} steps"
        )
    return WindowRows(source, columns, owner, cut[owner], context, horizon)


def _observed(
    values: npt.NDArray[np.float32], starts: Ints, context: int, horizon: int
) -> npt.NDArray[np.bool_]:
    """Which windows have a known value both in their past and in their future."""
    known = np.r_[0, np.cumsum(np.isfinite(values).any(1))]
    past = known[starts] - known[np.maximum(starts - context, 0)]
    future = known[starts + horizon] - known[starts]
    return np.asarray((past > 0) & (future > 0), bool)


def _starts(steps: int, horizon: int, stride: int, valid: float, test: float) -> dict[str, Ints]:
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
        "train": np.arange(1, end_train - horizon + 1, stride, dtype=np.int64),
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
