"""A `Forecaster` in the shapes of two libraries, without importing either.

    SeriesForecaster     fit(y, X, fh), predict(fh, X), predict_quantiles: what sktime calls
    DatasetForecaster    train(dataset), predict(dataset) -> forecasts: what gluonts calls

Sources: the interfaces of sktime's `BaseForecaster` and gluonts' `Estimator` and `Predictor`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polytask.errors import DataError, UserError
from polytask.infer.forecaster import Forecaster

Floats = NDArray[np.float32]
_ENTRIES = 512  # series forecast together


class SeriesForecaster:
    """One table of series with a time index in, the same columns ahead of it out.

    Args:
        forecaster: pretrained; it is not changed.
        settings: of `Forecaster.fit` (mode, steps, lr, ...). Without `mode` it is few-shot with X
            and zero-shot without.
    """

    def __init__(self, forecaster: Forecaster, **settings: Any) -> None:
        self.forecaster, self.settings = forecaster, settings
        self._fh: Any = None

    def fit(self, y: Any, X: Any = None, fh: Any = None) -> SeriesForecaster:
        """Learn from a pandas Series or table with a DatetimeIndex or PeriodIndex.

        Args:
            y: targets, one a column.
            X: controls known in advance, on the index of `y` or a longer one.
            fh: steps ahead that `predict` gives when it is not told.
        """
        self._fh = fh
        self._y, self._series = _frame(y, "y"), getattr(y, "name", None)
        self._single = getattr(y, "ndim", 2) == 1
        self._index = y.index
        self._X = None if X is None else _frame(X, "X")
        controls = [] if self._X is None else list(self._X.columns)
        settings = {"mode": "few-shot" if controls else "zero-shot", **self.settings}
        self.fitted_ = copy.copy(self.forecaster).fit(
            self._table(None),
            timestamp="timestamp",
            targets=list(self._y.columns),
            controls=controls,
            **settings,
        )
        return self

    def predict(self, fh: Any = None, X: Any = None) -> Any:
        """Forecasts of the steps in `fh` (1 is the first after y), a Series if y was one."""
        return self._wide(fh, X, "forecast")

    def predict_quantiles(self, fh: Any = None, X: Any = None, alpha: Any = (0.1, 0.5, 0.9)) -> Any:
        """A table with columns (target, level) for each level that the model has."""
        import pandas as pd

        levels = [alpha] if isinstance(alpha, float) else list(alpha)
        found = {level: pd.DataFrame(self._wide(fh, X, f"q{level:g}")) for level in levels}
        names = found[levels[0]].columns
        return pd.DataFrame(
            {(name, level): found[level][name] for name in names for level in levels}
        )

    def _wide(self, fh: Any, X: Any, column: str) -> Any:
        if not hasattr(self, "fitted_"):
            raise UserError("call fit(y) before predict")
        steps = _steps(self._fh if fh is None else fh)
        unseen = _unseen_end(self._y)
        long = self.fitted_.predict(self._table(X), horizon=unseen + max(steps))
        if column not in long.columns:
            known = ", ".join(c for c in long.columns if c.startswith("q"))
            raise UserError(f"the model has no quantile '{column[1:]}' (has: {known or 'none'})")
        wide = long.pivot(index="timestamp", columns="target", values=column)
        wide = wide[list(self._y.columns)].iloc[[unseen + step - 1 for step in steps]]
        wide.columns.name = None
        if hasattr(self._index, "to_timestamp"):
            wide.index = wide.index.to_period(self._index.freq)
        if not self._single:
            return wide
        return wide.iloc[:, 0].rename(self._series)

    def _table(self, X: Any) -> Any:
        """y beside the controls of its steps and, if X has later ones, of those to forecast."""
        import pandas as pd

        if self._X is None:
            return self._y.rename_axis("timestamp").reset_index()
        known = self._X
        if X is not None:
            new = _frame(X, "X")
            known = pd.concat([known[~known.index.isin(new.index)], new[list(known.columns)]])
        both = self._y.join(known, how="outer").sort_index()
        return both.rename_axis("timestamp").reset_index()


def _frame(table: Any, name: str) -> Any:
    """Columns under their names as text, on a DatetimeIndex."""
    import pandas as pd

    frame = table.to_frame(table.name or "y") if isinstance(table, pd.Series) else table
    if not isinstance(frame, pd.DataFrame):
        raise DataError(f"{name}: expected a pandas Series or table, not {type(table).__name__}")
    frame = frame.set_axis([str(column) for column in frame.columns], axis=1)
    if isinstance(frame.index, pd.PeriodIndex):
        return frame.set_axis(frame.index.to_timestamp(), axis=0)
    if not isinstance(frame.index, pd.DatetimeIndex):
        raise DataError(f"{name}: the index should be a DatetimeIndex or a PeriodIndex")
    return frame


def _unseen_end(target: Any) -> int:
    """Steps at the end without any value: forecasts begin before them."""
    values = np.asarray(target, dtype=np.float64)
    seen = np.flatnonzero(np.isfinite(values.reshape(len(values), -1)).any(1))
    return len(values) - (int(seen[-1]) + 1 if seen.size else 0)


def _steps(fh: Any) -> list[int]:
    """Whole steps ahead, from 1, as given."""
    if fh is None:
        raise UserError("give fh, the steps ahead to forecast, to fit or to predict")
    steps = np.atleast_1d(np.asarray(list(fh) if isinstance(fh, range) else fh))
    whole = steps.size > 0 and np.issubdtype(steps.dtype, np.integer)
    if not whole or steps.min() < 1:
        raise UserError(f"fh = {fh}: give whole steps ahead, from 1 (1 is the first after y)")
    return [int(step) for step in steps]


@dataclass(frozen=True)
class QuantileForecast:
    """One series' forecast as gluonts reads it: mean, quantiles, where it starts."""

    mean: Floats  # (steps,)
    quantiles: Mapping[float, Floats]  # level -> (steps,)
    start_date: Any  # a pandas Period
    item_id: str | None = None

    @property
    def prediction_length(self) -> int:
        return len(self.mean)

    @property
    def freq(self) -> Any:
        return self.start_date.freq

    @property
    def index(self) -> Any:
        """The periods of the steps."""
        import pandas as pd

        return pd.period_range(self.start_date, periods=len(self.mean), freq=self.freq)

    @property
    def median(self) -> Floats:
        return self.quantile(0.5)

    def quantile(self, q: float | str) -> Floats:
        """A level's forecast, between two levels by linear interpolation.

        Raises:
            UserError: the level lies outside of those that the model has.
        """
        level, levels = float(q), sorted(self.quantiles)
        if not levels or not levels[0] <= level <= levels[-1]:
            known = ", ".join(f"{one:g}" for one in levels) or "none"
            raise UserError(f"quantile {level:g} is outside of the model's levels ({known})")
        rows = np.stack([self.quantiles[one] for one in levels])
        at = int(np.clip(np.searchsorted(levels, level), 1, max(len(levels) - 1, 1)))
        if len(levels) == 1:
            return np.asarray(rows[0])
        share = (level - levels[at - 1]) / (levels[at] - levels[at - 1])
        return np.asarray(rows[at - 1] + share * (rows[at] - rows[at - 1]))


class DatasetForecaster:
    """Datasets of entries {'start': Period, 'target': (T,), 'item_id', 'feat_dynamic_real'}.

    Args:
        forecaster: pretrained; it is not changed.
        prediction_length: steps of every forecast.
        settings: of `Forecaster.fit`, for `train`.

    Entries share one frequency. `feat_dynamic_real` (k, T + prediction_length) holds controls known
    in advance; with them `train` has to come first.
    """

    def __init__(self, forecaster: Forecaster, prediction_length: int, **settings: Any) -> None:
        if prediction_length < 1:
            raise UserError(f"prediction_length = {prediction_length}: should be at least 1")
        self.forecaster, self.prediction_length = forecaster, prediction_length
        self.settings = settings
        self._fitted: Forecaster | None = None

    def train(self, training_data: Iterable[Mapping[str, Any]]) -> DatasetForecaster:
        """A new one, tuned to the dataset."""
        entries = list(training_data)
        tuned = copy.copy(self)
        tuned._fitted = copy.copy(self.forecaster).fit(
            **self._roles(entries), **self.settings, table=self._table(entries)
        )
        return tuned

    def predict(
        self, dataset: Iterable[Mapping[str, Any]], num_samples: int | None = None
    ) -> Iterator[QuantileForecast]:
        """Forecasts in the order of the entries, read as they come. `num_samples` plays no part:
        quantiles are the model's own."""
        rest = iter(dataset)
        while entries := list(islice(rest, _ENTRIES)):
            yield from self._predict(entries)

    def _predict(self, entries: Sequence[Mapping[str, Any]]) -> Iterator[QuantileForecast]:
        table, roles, fitted = self._table(entries), self._roles(entries), self._fitted
        if fitted is None:
            if roles["controls"]:
                raise UserError("feat_dynamic_real needs training: call train(dataset) first")
            fitted = copy.copy(self.forecaster).fit(table, **roles, mode="zero-shot")
        unseen = [_unseen_end(entry["target"]) for entry in entries]
        long = fitted.predict(table, horizon=self.prediction_length + max(unseen))
        levels = fitted.model.config.quantiles
        found = long.groupby("id", sort=True)
        for entry, skipped, (_, part) in zip(entries, unseen, found, strict=True):
            part = part.iloc[skipped : skipped + self.prediction_length]
            yield QuantileForecast(
                part["forecast"].to_numpy(),
                {level: part[f"q{level:g}"].to_numpy() for level in levels},
                entry["start"] + len(entry["target"]),
                entry.get("item_id"),
            )

    def _roles(self, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if not entries:
            raise DataError("the dataset has no entries")
        names = sorted({entry["start"].freqstr for entry in entries})
        if len(names) > 1:
            raise DataError(f"entries have the frequencies {', '.join(names)}; give one at a time")
        counts = {len(entry.get("feat_dynamic_real", ())) for entry in entries}
        if len(counts) > 1:
            raise DataError(f"entries have {sorted(counts)} rows of feat_dynamic_real")
        return {
            "timestamp": "timestamp",
            "targets": ["target"],
            "id": "id",
            "controls": [f"feat_{k}" for k in range(counts.pop())],
            "frequency": names[0],
        }

    def _table(self, entries: Sequence[Mapping[str, Any]]) -> Any:
        import pandas as pd

        parts = []
        for number, entry in enumerate(entries):
            target, start = np.asarray(entry["target"], dtype=np.float64), entry["start"]
            features = np.asarray(entry.get("feat_dynamic_real", ()), dtype=np.float64)
            steps = max(target.size, features.shape[1] if features.ndim == 2 else 0)
            if target.ndim != 1 or (features.size and features.shape[-1] < len(target)):
                raise DataError(
                    f"entry {number} ({entry.get('item_id', 'no item_id')}): target has shape "
                    f"{target.shape}, feat_dynamic_real {features.shape}; expected (T,) and (k, T "
                    "+ prediction_length)"
                )
            stamps = pd.period_range(start, periods=steps, freq=start.freq).to_timestamp()
            columns: dict[str, Any] = {"id": f"{number:09d}", "timestamp": stamps}
            columns["target"] = np.pad(target, (0, steps - len(target)), constant_values=np.nan)
            columns |= {f"feat_{k}": row for k, row in enumerate(features)}
            parts.append(pd.DataFrame(columns))
        return pd.concat(parts, ignore_index=True)
