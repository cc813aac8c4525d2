"""Recordings from NWB files (Neurodata Without Borders: HDF5 with a schema).

Everything is laid onto one grid that begins where the latest of the chosen streams begins and
ends with the earliest end. Behaviour and frames are sampled by holding: grid time t gets the last
sample at or before t, so nothing of the future leaks into the past by interpolation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polytask.data.spikes import Recording
from polytask.errors import DataError, MissingExtra, suggestion

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class _Series:
    """A stream of an NWB file: values (samples, ...), and when each was taken (seconds)."""

    name: str
    values: NDArray[Any]
    times: Floats

    @property
    def step(self) -> float:
        return float(np.median(np.diff(self.times))) if len(self.times) > 1 else 0.0

    @property
    def end(self) -> float:
        return float(self.times[-1]) + self.step

    def held(self, grid: NDArray[Any]) -> NDArray[np.int64]:
        """Index of the last sample at or before each grid time (a microsecond is forgiven)."""
        return np.maximum(np.searchsorted(self.times, grid + 1e-6, side="right") - 1, 0)


def read_nwb(
    path: Path,
    dt: float = 0.01,
    *,
    units: str | Sequence[int] | None = None,
    behavior: Sequence[str] | None = None,
    frames: str | None = None,
    dt_b: float = 0.05,
    frame_rate: float | None = None,
    shrink: int = 1,
    start: float | None = None,
    stop: float | None = None,
    trials: bool = False,
) -> Recording:
    """A recording from an NWB file.

    Args:
        path: the .nwb file.
        dt: width of a bin, seconds.
        units: rows of the units table to take, or the name of a boolean column ('is_good'). All
            units by default.
        behavior: names of time series (wherever they stand in the file). By default every
            one-dimensional or few-column series of the processing module 'behavior'. A series of
            several columns gives NAME_0, NAME_1, ...
        frames: name of an ImageSeries (or OpticalSeries, or IndexSeries that shows one).
        dt_b: seconds between samples of behaviour on the grid.
        frame_rate: of the grid, Hz; the series' own by default.
        shrink: average blocks of that many pixels a side.
        start, stop: seconds of the session's clock, to take a part.
        trials: keep the trials table's boundaries; windows then stay within a trial.

    Raises:
        MissingExtra: pynwb is not installed.
        DataError: no such file, unit or series; no units; video outside the file; streams that do
            not overlap in time; anything that `Recording.from_arrays` refuses.
    """
    try:
        from pynwb import NWBHDF5IO
    except ImportError as error:
        raise MissingExtra("pynwb", "neuro", f"reading {path.name}") from error
    if not path.is_file():
        raise DataError(f"{path} does not exist")
    try:
        source = NWBHDF5IO(str(path), "r", load_namespaces=True)
    except OSError as error:
        raise DataError(f"{path} is not an NWB (HDF5) file: {error}") from error
    with source:
        session = source.read()
        trains, names = _units(session, units, path)
        streams = _streams(session, behavior, path)
        film, order = _film(session, frames, shrink, path)
        spans = _trials(session, path) if trials else None
    every = [*streams, film] if film is not None else streams
    begin, end = _overlap(trains, every, start, stop, path)
    seconds = np.floor((end - begin) / dt + 1e-6) * dt
    if seconds <= 0:
        raise DataError(f"{path}: the chosen streams have no time in common")
    inside = [
        train[(train >= begin) & (train < begin + seconds - 1e-9)] - begin for train in trains
    ]
    given: dict[str, Any] = {}
    if streams:
        grid = begin + np.arange(int(np.ceil(seconds / dt_b - 1e-9))) * dt_b
        given["behavior"] = _columns(streams, grid)
        given["dt_b"] = dt_b
    if film is not None:
        rate = frame_rate or round(1 / film.step, 3)
        grid = begin + np.arange(int(np.ceil(seconds * rate - 1e-9))) / rate
        index = film.held(grid)
        given |= {
            "frames": film.values,
            "frame_rate": rate,
            "shown": index if order is None else order[index],
        }
    if spans is not None:
        spans = np.clip(spans - begin, 0, seconds)
        given["trials"] = spans[spans[:, 1] - spans[:, 0] >= dt]
    try:
        return Recording.from_arrays(
            units=np.repeat(np.arange(len(inside)), [len(train) for train in inside]),
            times=np.concatenate(inside),
            dt=dt,
            n_units=len(inside),
            duration=float(seconds),
            names=names,
            start=begin,
            **given,
        )
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _units(
    session: Any, chosen: str | Sequence[int] | None, path: Path
) -> tuple[list[Floats], list[str]]:
    table = session.units
    if table is None or "spike_times" not in table.colnames or not len(table):
        raise DataError(f"{path} has no units table with spike_times; sort its spikes first")
    rows = np.arange(len(table))
    if isinstance(chosen, str):
        if chosen not in table.colnames:
            known = suggestion(chosen, table.colnames)
            raise DataError(f"{path}: the units table has no column '{chosen}'.{known}")
        rows = rows[np.asarray(table[chosen][:], bool)]
    elif chosen is not None:
        rows = np.asarray(chosen, np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < len(table):
            raise DataError(f"{path}: units are rows 0 to {len(table) - 1}; got {rows.max()}")
    if not rows.size:
        raise DataError(f"{path}: no unit is left")
    ids = table.id[:]
    trains = [np.asarray(table["spike_times"][int(row)], float) for row in rows]
    return trains, [str(ids[row]) for row in rows]


def _streams(session: Any, wanted: Sequence[str] | None, path: Path) -> list[_Series]:
    from pynwb import TimeSeries
    from pynwb.image import ImageSeries, IndexSeries

    known: dict[str, Any] = {}
    for value in session.objects.values():
        if isinstance(value, TimeSeries) and not isinstance(value, ImageSeries | IndexSeries):
            known.setdefault(str(value.name), value)
    if wanted is None:
        module = session.processing.get("behavior")
        inside: list[Any] = [] if module is None else list(_inside(module, TimeSeries))
        numbers = [s for s in inside if np.issubdtype(s.data.dtype, np.number)]
        names = [str(s.name) for s in numbers if s.name in known and len(s.data.shape) <= 2]
    else:
        names = list(wanted)
    found = []
    for name in names:
        if name not in known:
            raise DataError(f"{path} has no time series '{name}'.{suggestion(name, known)}")
        found.append(_series(known[name], np.asarray(known[name].data[:]), path))
    return found


def _inside(container: Any, kind: type) -> Any:
    """Series anywhere below a container, in the file's order."""
    for child in container.children:
        if isinstance(child, kind):
            yield child
        else:
            yield from _inside(child, kind)


def _series(series: Any, values: NDArray[Any], path: Path) -> _Series:
    if series.timestamps is not None:
        times = np.asarray(series.timestamps[:], float)
    else:
        times = (series.starting_time or 0.0) + np.arange(len(values)) / series.rate
    if len(times) != len(values) or not len(times):
        raise DataError(
            f"{path}: '{series.name}' has {len(values)} samples, but {len(times)} times"
        )
    if (np.diff(times) < 0).any():
        raise DataError(f"{path}: the times of '{series.name}' do not ascend")
    if np.issubdtype(values.dtype, np.number):
        values = values * (series.conversion or 1.0) + (series.offset or 0.0)
    return _Series(series.name, values, times)


def _film(
    session: Any, name: str | None, shrink: int, path: Path
) -> tuple[_Series | None, NDArray[np.int64] | None]:
    from pynwb.image import ImageSeries, IndexSeries

    if name is None:
        return None, None
    kinds = (ImageSeries, IndexSeries)
    known = {v.name: v for v in session.objects.values() if isinstance(v, kinds)}
    if name not in known:
        raise DataError(f"{path} has no image series '{name}'.{suggestion(name, known)}")
    series, order = known[name], None
    pictures = series
    if isinstance(series, IndexSeries):
        order = np.asarray(series.data[:], np.int64)
        pictures = series.indexed_timeseries
        if pictures is None:
            raise DataError(f"{path}: '{name}' shows no image series of the file")
    if getattr(pictures, "external_file", None) is not None:
        raise DataError(
            f"{path}: the pictures of '{name}' are in a file of their own; convert them"
        )
    values = np.asarray(pictures.data[:], np.float32)
    if values.ndim == 4:
        values = values.mean(axis=3)
    if shrink > 1 and values.ndim == 3:
        high, wide = (edge // shrink for edge in values.shape[1:])
        values = values[:, : high * shrink, : wide * shrink]
        values = values.reshape(len(values), high, shrink, wide, shrink).mean(axis=(2, 4))
    count = len(values) if order is None else len(order)
    return _Series(name, values, _series(series, np.zeros(count), path).times), order


def _trials(session: Any, path: Path) -> Floats:
    if session.trials is None or not len(session.trials):
        raise DataError(f"{path} has no trials table; leave out trials=True")
    table = session.trials
    return np.stack([np.asarray(table[c][:], float) for c in ("start_time", "stop_time")], axis=1)


def _overlap(
    trains: list[Floats],
    streams: Sequence[_Series],
    start: float | None,
    stop: float | None,
    path: Path,
) -> tuple[float, float]:
    """Where all streams are there; spikes alone reach from 0 to the last one."""
    last = max((float(train[-1]) for train in trains if len(train)), default=0.0)
    begin = max([0.0, *(float(s.times[0]) for s in streams)])
    end = min([s.end for s in streams], default=last + 1e-3)
    begin = begin if start is None else max(begin, start)
    end = end if stop is None else min(end, stop)
    if end <= begin:
        raise DataError(f"{path}: nothing is left between {begin:g} s and {end:g} s")
    return begin, end


def _columns(streams: Sequence[_Series], grid: NDArray[Any]) -> dict[str, NDArray[Any]]:
    found: dict[str, NDArray[Any]] = {}
    for series in streams:
        values = series.values[series.held(grid)]
        if values.ndim == 1:
            found[series.name] = values
            continue
        for column in range(values.shape[1]):
            found[f"{series.name}_{column}"] = values[:, column]
    return found
