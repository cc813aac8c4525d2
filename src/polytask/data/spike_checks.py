"""What `Recording.from_arrays` and `from_npz` accept, and what they say about the rest."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from polytask.data.spike_tokens import Ints, raster_events, whole_bins, whole_counts
from polytask.data.spikes import VERSION, Recording, ceil_times, fraction
from polytask.errors import DataError, suggestion


def built(
    spikes: ArrayLike | None,
    dt: float,
    *,
    units: ArrayLike | None,
    times: ArrayLike | None,
    n_units: int | None,
    duration: float | None,
    frames: ArrayLike | None,
    frame_rate: float | None,
    shown: ArrayLike | None,
    behavior: Mapping[str, ArrayLike] | None,
    dt_b: float | None,
    trials: ArrayLike | None,
    names: Sequence[str] | None,
    start: float,
) -> Recording:
    """See `Recording.from_arrays`."""
    if not (np.isfinite(dt) and dt > 0):
        raise DataError(f"dt must be a positive number of seconds, not {dt}")
    if spikes is not None:
        if units is not None or times is not None:
            raise DataError("give either `spikes` (counts) or `units` and `times`, not both")
        counts = whole_counts(spikes)
        if counts.ndim != 2:
            raise DataError(f"spikes must be counts (units, bins), not of shape {counts.shape}")
        unit, step = raster_events(counts)
        total, steps = counts.shape
        if n_units is not None and n_units != total:
            raise DataError(f"n_units = {n_units}, but spikes has {total} rows")
    else:
        unit, step, total, steps = _events(units, times, dt, n_units, duration)
    if not total or not steps:
        raise DataError(f"the recording is empty: {total} units, {steps} bins")
    pictures, order = _frames(frames, frame_rate, shown, steps, dt)
    values, classes = _behavior(behavior, dt_b, steps, dt)
    return Recording(
        unit,
        step,
        total,
        steps,
        float(dt),
        _names(names, total),
        pictures,
        None if pictures is None or frame_rate is None else float(frame_rate),
        order,
        values,
        classes,
        float(dt_b) if values and dt_b is not None else None,
        _trials(trials, steps, dt),
        float(start),
    )


def _events(
    units: ArrayLike | None,
    times: ArrayLike | None,
    dt: float,
    n_units: int | None,
    duration: float | None,
) -> tuple[Ints, Ints, int, int]:
    if units is None or times is None:
        raise DataError("a recording needs `spikes` (counts), or both `units` and `times`")
    unit, time = np.asarray(units), np.asarray(times, float)
    if unit.ndim != 1 or unit.shape != time.shape:
        raise DataError(
            f"units {unit.shape} and times {time.shape} must be two lists of the same length"
        )
    if unit.size and not np.issubdtype(unit.dtype, np.integer):
        raise DataError(f"units must be whole numbers, not {unit.dtype}")
    if not np.isfinite(time).all():
        raise DataError(f"spike {int(np.argmin(np.isfinite(time)))} has no finite time")
    if time.size and time.min() < 0:
        raise DataError(f"spike times count from the recording's start; {time.min()} s is before")
    total = int(n_units) if n_units is not None else (int(unit.max()) + 1 if unit.size else 0)
    if unit.size and (unit.min() < 0 or unit.max() >= total):
        wrong = unit.min() if unit.min() < 0 else unit.max()
        raise DataError(f"unit {wrong} is not among the {total} units 0 to {total - 1}")
    # A time that is a whole number of bins belongs to that bin, whatever the float says.
    step = np.floor(np.round(time / dt, 6)).astype(np.int64)
    if duration is None:
        steps = int(step.max()) + 1 if step.size else 0
    else:
        steps = whole_bins(duration, dt, "duration")
        if step.size and step.max() >= steps:
            raise DataError(f"a spike at {time.max()} s lies beyond the duration of {duration} s")
    order = np.lexsort((unit, step))
    return unit[order].astype(np.int64), step[order], total, steps


def _frames(
    frames: ArrayLike | None,
    frame_rate: float | None,
    shown: ArrayLike | None,
    steps: int,
    dt: float,
) -> tuple[NDArray[np.float32] | None, Ints | None]:
    if frames is None:
        if shown is not None or frame_rate is not None:
            raise DataError("`frame_rate` and `shown` speak of frames, but there are no `frames`")
        return None, None
    pictures = np.asarray(frames, np.float32)
    if pictures.ndim != 3:
        raise DataError(
            f"frames must have the shape (frames, height, width), not {pictures.shape}; "
            "turn colour into grey first"
        )
    if frame_rate is None or not frame_rate > 0:
        raise DataError(f"frames need `frame_rate`, in Hz, above 0; it is {frame_rate}")
    bad = ~np.isfinite(pictures).reshape(len(pictures), -1).all(axis=1)
    if bad.any():
        raise DataError(f"frame {int(np.argmax(bad))} holds NaN or infinite values")
    order = None
    if shown is not None:
        order = np.asarray(shown, np.int64)
        if order.ndim != 1 or (order.size and not 0 <= order.min() <= order.max() < len(pictures)):
            raise DataError(f"`shown` must list frames 0 to {len(pictures) - 1}")
    count = len(pictures) if order is None else len(order)
    wanted = int(ceil_times(np.array(steps), fraction(dt) * fraction(frame_rate)))
    if count < wanted:
        raise DataError(
            f"{count} frames at {frame_rate} Hz last {count / frame_rate:g} s, but the spikes last "
            f"{steps * dt:g} s; {wanted} frames are needed. Cut the spikes or check frame_rate"
        )
    return pictures, order


def _behavior(
    behavior: Mapping[str, ArrayLike] | None, dt_b: float | None, steps: int, dt: float
) -> tuple[dict[str, NDArray[Any]], dict[str, tuple[str, ...]]]:
    values: dict[str, NDArray[Any]] = {}
    classes: dict[str, tuple[str, ...]] = {}
    if not behavior:
        return values, classes
    if dt_b is None or not dt_b > 0:
        raise DataError(f"behaviour needs `dt_b`, the seconds between samples, above 0; not {dt_b}")
    wanted = int(ceil_times(np.array(steps), fraction(dt) / fraction(dt_b)))
    for name, given in behavior.items():
        column = np.asarray(given)
        if column.ndim != 1 or len(column) != wanted:
            raise DataError(
                f"behaviour '{name}' has shape {column.shape}, but {steps} bins of {dt} s with a "
                f"sample every {dt_b} s make {wanted} samples"
            )
        if np.issubdtype(column.dtype, np.number) and not np.issubdtype(
            column.dtype, np.complexfloating
        ):
            column = column.astype(np.float32)
            if not np.isfinite(column).all():
                first = int(np.argmin(np.isfinite(column)))
                raise DataError(f"behaviour '{name}' is NaN or infinite at sample {first}")
            values[name] = column
        else:
            labels, codes = np.unique(column.astype(str), return_inverse=True)
            classes[name] = tuple(str(label) for label in labels)
            values[name] = codes.astype(np.int64)
    return values, classes


def _names(names: Sequence[str] | None, total: int) -> tuple[str, ...]:
    if names is None:
        return tuple(str(i) for i in range(total))
    found = tuple(str(name) for name in names)
    if len(found) != total or len(set(found)) != total:
        raise DataError(f"names must be {total} different names, one per unit")
    return found


def _trials(trials: ArrayLike | None, steps: int, dt: float) -> Ints | None:
    if trials is None:
        return None
    times = np.asarray(trials, float)
    if times.ndim != 2 or times.shape[1] != 2 or not np.isfinite(times).all():
        raise DataError(f"trials must be pairs (start, end) in seconds, not {times.shape}")
    bins = np.round(times / dt).astype(np.int64)
    bins = bins[np.argsort(bins[:, 0], kind="stable")]
    if (bins[:, 1] <= bins[:, 0]).any() or (bins[1:, 0] < bins[:-1, 1]).any():
        raise DataError("trials must end after they start and not overlap")
    if bins.size and (bins.min() < 0 or bins.max() > steps):
        raise DataError(f"trials reach out of the recording of {steps * dt:g} s")
    return bins


_OWN = ("units", "times", "frames", "shown", "trials", "names")
_NUMBERS = ("dt", "frame_rate", "dt_b", "duration", "start")


def read_npz(path: Path, options: Mapping[str, Any]) -> Recording:
    """See `Recording.from_npz`."""
    if not path.is_file():
        raise DataError(f"{path} does not exist")
    try:
        with np.load(path, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
    except (ValueError, OSError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(f"{path} cannot be read as .npz without pickles: {error}") from error
    if "header" in arrays:
        if options:
            raise DataError(
                f"{path} was written by Recording.save and says everything itself; "
                f"leave out {', '.join(sorted(options))}"
            )
        return _saved(path, arrays)
    given: dict[str, Any] = {}
    behavior: dict[str, Any] = {}
    for name, value in arrays.items():
        if name.startswith("behavior_"):
            behavior[name.removeprefix("behavior_")] = value
        elif name in _NUMBERS:
            given[name] = float(value)
        elif name == "n_units":
            given[name] = int(value)
        elif name == "spikes" or name in _OWN:
            given[name] = value
        else:
            known = ("spikes", "n_units", "behavior_NAME", *_OWN, *_NUMBERS)
            raise DataError(f"{path}: unknown array '{name}'.{suggestion(name, known)}")
    if behavior:
        given["behavior"] = behavior
    given |= options
    try:
        return Recording.from_arrays(given.pop("spikes", None), **given)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _saved(path: Path, arrays: dict[str, NDArray[Any]]) -> Recording:
    try:
        header = json.loads(str(arrays["header"]))
        if header["version"] != VERSION:
            raise DataError(f"{path} has version {header['version']}; this is version {VERSION}")
        return Recording(
            arrays["unit"],
            arrays["step"],
            header["n_units"],
            header["n_steps"],
            header["dt"],
            tuple(header["names"]),
            arrays.get("frames"),
            header["frame_rate"],
            arrays.get("shown"),
            {name: arrays[f"behavior{i}"] for i, name in enumerate(header["behavior"])},
            {name: tuple(labels) for name, labels in header["classes"].items()},
            header["dt_b"],
            arrays.get("trials"),
            header["start"],
        )
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path} is not a whole recording: {error}") from error
