"""Windows over thousands of series, gathered without copying the series.

A window is `context` steps of past and `horizon` steps of future. Windows of a data set are
numbered 0 .. size-1, so a mixture sampler can draw (data set, number) pairs and everything it
promises (exact shares, no repeats within an epoch, resumption) holds for windows too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from polytask.data.calendar import Frequency
from polytask.errors import DataError

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Record:
    """One series: values (steps, channels) with NaN for missing, and its frequency."""

    values: Floats
    frequency: Frequency


@dataclass(frozen=True)
class Windows:
    """Gathered windows. NaN is missing: before a series' start, or unobserved."""

    past: Floats  # (n, context, channels)
    future: Floats  # (n, horizon, channels)
    token: Ints  # (n,) resolution token
    series: Ints  # (n,) index of the series within its data set


class WindowSet:
    """All windows of several data sets.

    Args:
        datasets: name -> series. All series have the same number of channels.
        context: steps of past; a window near a series' start is padded with NaN in front.
        horizon: steps of future, always whole.
        shortest: least number of real past steps in a window.
        stride: steps between neighbouring windows.

    Raises:
        DataError: channels differ, or a data set has no window at all.
    """

    def __init__(
        self,
        datasets: Mapping[str, Sequence[Record]],
        context: int,
        horizon: int,
        shortest: int | None = None,
        stride: int = 1,
    ) -> None:
        self.names = tuple(datasets)
        self.context, self.horizon, self.stride = context, horizon, stride
        self.shortest = min(context, horizon if shortest is None else shortest)
        records = [record for series in datasets.values() for record in series]
        channels = {record.values.shape[1] for record in records}
        if len(channels) != 1:
            raise DataError(f"series must have one number of channels, not {sorted(channels)}")
        lengths = np.array([len(record.values) for record in records], dtype=np.int64)
        self._buffer = np.concatenate([record.values for record in records])
        self._start = np.concatenate([[0], np.cumsum(lengths)])[:-1]
        self._token = np.array([record.frequency.token for record in records], dtype=np.int64)
        usable = lengths - self.shortest - horizon
        counts = np.where(usable >= 0, usable // stride + 1, 0)
        owners = np.repeat(np.arange(len(datasets)), [len(series) for series in datasets.values()])
        self._first_series = np.searchsorted(owners, np.arange(len(datasets)))
        self._cumulative = np.concatenate([[0], np.cumsum(counts)])
        self._offset = self._cumulative[self._first_series]
        ends = np.append(self._offset[1:], self._cumulative[-1])
        self.sizes: tuple[int, ...] = tuple(int(n) for n in ends - self._offset)
        for name, size in zip(self.names, self.sizes, strict=True):
            if size == 0:
                raise DataError(
                    f"data set '{name}' has no series of {self.shortest + horizon} steps "
                    f"(at least {self.shortest} of context and {horizon} of horizon)"
                )

    def gather(self, dataset: Ints, index: Ints) -> Windows:
        """Windows number `index` of each `dataset`; both (n,) int."""
        number = self._offset[dataset] + index
        series = np.searchsorted(self._cumulative, number, side="right") - 1
        step = (number - self._cumulative[series]) * self.stride + self.shortest
        start = self._start[series]
        rows = (start + step)[:, None] + np.arange(-self.context, self.horizon)
        values = self._buffer[np.maximum(rows, start[:, None])]
        values[rows < start[:, None]] = np.nan
        return Windows(
            past=values[:, : self.context],
            future=values[:, self.context :],
            token=self._token[series],
            series=series - self._first_series[dataset],
        )


def downsample(record: Record, factor: int) -> Record | None:
    """The series at `factor` times its step by averaging; None when too short or without a name.

    Averages leave out missing steps; a block without any is missing. The blocks end at the last
    step, so the newest value is kept. Source: arXiv 2401.03955, section 3.1 (diverse resolutions).
    """
    coarse = Frequency(record.frequency.unit, record.frequency.count * factor)
    blocks = len(record.values) // factor
    if blocks == 0 or coarse.token == 0:
        return None
    tail = record.values[len(record.values) - blocks * factor :]
    cut = tail.reshape(blocks, factor, -1)
    seen = np.isfinite(cut).sum(1)
    mean = np.where(np.isfinite(cut), cut, 0).sum(1) / np.maximum(seen, 1)
    return Record(np.where(seen, mean, np.nan).astype(np.float32), coarse)


def univariate(records: Sequence[Record]) -> list[Record]:
    """Every channel as a series of its own (views)."""
    return [
        Record(record.values[:, c : c + 1], record.frequency)
        for record in records
        for c in range(record.values.shape[1])
    ]


def standardise(record: Record) -> Record | None:
    """Zero mean and unit variance per channel over the whole record; None if one is constant.

    For pretraining, where the record is what may be seen: a window's future is in the same units.
    """
    seen = np.isfinite(record.values)
    count = np.maximum(seen.sum(0), 1)
    values = np.where(seen, record.values, 0).astype(np.float64)
    mean = values.sum(0) / count
    deviation = np.sqrt((np.where(seen, values - mean, 0) ** 2).sum(0) / count)
    if not (deviation > 1e-6 * np.maximum(np.abs(mean), 1e-30)).all():
        return None
    return Record(((record.values - mean) / deviation).astype(np.float32), record.frequency)


def with_coarser(
    datasets: Mapping[str, Sequence[Record]],
    factors: Sequence[int] = (2, 3, 4, 7, 12, 24),
    shortest: int = 1,
) -> dict[str, list[Record]]:
    """Every data set, and 'NAME at FREQUENCY' with its downsampled copies where those have a name
    and at least `shortest` steps.

    Source: arXiv 2401.03955, section 3.1 (diverse resolution sampling).
    """
    found = {name: list(records) for name, records in datasets.items()}
    for name, records in datasets.items():
        for record in records:
            for factor in factors:
                coarse = downsample(record, factor)
                if coarse is not None and len(coarse.values) >= shortest:
                    found.setdefault(f"{name} at {coarse.frequency.name}", []).append(coarse)
    return found
