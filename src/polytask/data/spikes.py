"""Recordings of spiking populations: spikes, what was shown, what the animal did.

Everything lies on one grid of bins of `dt` seconds that starts at 0. Spikes are kept as events in
whole bins (sorted, repeated where a bin holds several), so that any window of a long recording
costs two binary searches. Frame k is shown from k / frame_rate on; sample j of a behaviour
variable was taken at j * dt_b. What belongs before bin t is found by exact fractions, never by
comparing floats.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from polytask import files
from polytask.data.spike_tokens import Ints
from polytask.errors import DataError

VERSION = 1


def fraction(value: float) -> Fraction:
    """A duration or rate as the simple fraction that was meant: 0.05 is 1/20."""
    return Fraction(value).limit_denominator(1_000_000)


def ceil_times(bins: Ints, ratio: Fraction) -> Ints:
    """ceil(bins * ratio) in whole numbers."""
    return -((-np.asarray(bins, np.int64) * ratio.numerator) // ratio.denominator)


@dataclass(frozen=True)
class Recording:
    """A recorded (or simulated) population.

    Build one with `from_arrays`, `from_npz` or `from_nwb`, which check everything.

    Attributes:
        unit, step: (S,) int64, unit and bin of every spike, ordered by (step, unit).
        n_units, n_steps: units; bins of `dt` seconds.
        names: a name per unit.
        frames: (F, H, W) float32, or None; `frame_rate` in Hz.
        shown: (P,) int64 rows of `frames` in the order of presentation; None if each was shown
            once, in order. Repeated movies are stored once.
        behavior: name -> (samples,) float32, or int64 codes of `classes[name]`; every `dt_b`
            seconds.
        trials: (R, 2) int64 first bin and end bin of trials; None for one uninterrupted stretch.
            No window reaches from one trial into another.
        start: seconds from the session's start to bin 0.
    """

    unit: Ints
    step: Ints
    n_units: int
    n_steps: int
    dt: float
    names: tuple[str, ...]
    frames: NDArray[np.float32] | None = None
    frame_rate: float | None = None
    shown: Ints | None = None
    behavior: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    dt_b: float | None = None
    trials: Ints | None = None
    start: float = 0.0

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.n_steps * self.dt

    @property
    def rates(self) -> NDArray[np.float64]:
        """(N,) spikes per second."""
        return np.bincount(self.unit, minlength=self.n_units) / max(self.duration, self.dt)

    @property
    def spans(self) -> Ints:
        """(R, 2) stretches of bins that no window may cross: the trials, or the whole."""
        return np.array([[0, self.n_steps]]) if self.trials is None else self.trials

    def raster(self, start: int = 0, stop: int | None = None) -> Ints:
        """(N, stop - start) int64 counts of bins `start` to `stop`."""
        first, last = _range(start, stop, self.n_steps)
        low, high = np.searchsorted(self.step, [first, last])
        width = last - first
        flat = self.unit[low:high] * width + self.step[low:high] - first
        counts = np.bincount(flat, minlength=self.n_units * width)
        return counts.reshape(self.n_units, width).astype(np.int64)

    def frames_before(self, bins: Ints) -> Ints:
        """How many frames have started before the given bins."""
        if self.frame_rate is None:
            raise DataError("the recording has no frames")
        return ceil_times(bins, fraction(self.dt) * fraction(self.frame_rate))

    def samples_before(self, bins: Ints) -> Ints:
        """How many behaviour samples were taken before the given bins."""
        if self.dt_b is None:
            raise DataError("the recording has no behaviour")
        return ceil_times(bins, fraction(self.dt) / fraction(self.dt_b))

    @property
    def n_shown(self) -> int:
        """Frames in the order of presentation."""
        if self.frames is None:
            return 0
        return len(self.frames) if self.shown is None else len(self.shown)

    def slice(self, start: int, stop: int | None = None) -> Recording:
        """Bins `start` to `stop` as a recording of its own.

        Raises:
            DataError: the range is empty or reaches out of the recording, or a frame or a
                behaviour sample does not begin exactly at bin `start`.
        """
        first, last = _range(start, stop, self.n_steps)
        low, high = np.searchsorted(self.step, [first, last])
        ends = np.array([first, last])
        frames, shown, behavior = self.frames, self.shown, dict(self.behavior)
        if frames is not None and self.frame_rate is not None:
            _on_grid(first, fraction(self.dt) * fraction(self.frame_rate), "frame")
            a, b = self.frames_before(ends)
            frames, shown = (frames[a:b], None) if shown is None else (frames, shown[a:b])
        if behavior and self.dt_b is not None:
            _on_grid(first, fraction(self.dt) / fraction(self.dt_b), "behaviour sample")
            a, b = self.samples_before(ends)
            behavior = {name: values[a:b] for name, values in behavior.items()}
        trials = self.trials
        if trials is not None:
            trials = np.clip(trials, first, last) - first
            trials = trials[trials[:, 1] > trials[:, 0]]
        return Recording(
            self.unit[low:high],
            self.step[low:high] - first,
            self.n_units,
            last - first,
            self.dt,
            self.names,
            frames,
            self.frame_rate,
            shown,
            behavior,
            self.classes,
            self.dt_b,
            trials,
            self.start + first * self.dt,
        )

    @staticmethod
    def from_arrays(
        spikes: ArrayLike | None = None,
        dt: float = 0.01,
        *,
        units: ArrayLike | None = None,
        times: ArrayLike | None = None,
        n_units: int | None = None,
        duration: float | None = None,
        frames: ArrayLike | None = None,
        frame_rate: float | None = None,
        shown: ArrayLike | None = None,
        behavior: Mapping[str, ArrayLike] | None = None,
        dt_b: float | None = None,
        trials: ArrayLike | None = None,
        names: Sequence[str] | None = None,
        start: float = 0.0,
    ) -> Recording:
        """A recording from arrays in memory.

        Args:
            spikes: (N, T) counts per bin; leave out to give events instead.
            dt: width of a bin, seconds.
            units, times: (S,) unit index and time in seconds of every spike, in any order;
                `n_units` and `duration` (seconds) say how large the recording is.
            frames: (F, H, W) pictures; `frame_rate` in Hz.
            shown: (P,) order of presentation, where frames were repeated.
            behavior: name -> (samples,) numbers, or labels (text) to be classified.
            dt_b: seconds between samples of behaviour.
            trials: (R, 2) starts and ends in seconds.
            names: a name per unit.

        Raises:
            DataError: negative or broken counts, units or times out of range, NaN in frames or
                behaviour, lengths that do not fit the spikes, settings that are missing.
        """
        from polytask.data.spike_checks import built

        return built(
            spikes,
            dt,
            units=units,
            times=times,
            n_units=n_units,
            duration=duration,
            frames=frames,
            frame_rate=frame_rate,
            shown=shown,
            behavior=behavior,
            dt_b=dt_b,
            trials=trials,
            names=names,
            start=start,
        )

    def save(self, path: Path | str) -> Path:
        """Write everything into one .npz (compressed, no pickle), whole or not at all."""
        target = Path(path)
        header = {
            "version": VERSION,
            "n_units": self.n_units,
            "n_steps": self.n_steps,
            "dt": self.dt,
            "names": list(self.names),
            "frame_rate": self.frame_rate,
            "dt_b": self.dt_b,
            "start": self.start,
            "behavior": list(self.behavior),
            "classes": {name: list(labels) for name, labels in self.classes.items()},
        }
        arrays: dict[str, Any] = {"unit": self.unit, "step": self.step}
        for name in ("frames", "shown", "trials"):
            if getattr(self, name) is not None:
                arrays[name] = getattr(self, name)
        arrays |= {f"behavior{i}": values for i, values in enumerate(self.behavior.values())}
        with files.writing(target) as aside, aside.open("wb") as handle:
            np.savez_compressed(handle, header=np.array(json.dumps(header)), **arrays)
        return target

    @staticmethod
    def from_npz(path: Path | str, **options: Any) -> Recording:
        """A recording from a .npz file: one that `save` wrote, or one's own.

        One's own file holds the arguments of `from_arrays` under their names (`spikes`, or `units`
        and `times`; `dt`, `frames`, ...); a behaviour variable is stored as `behavior_NAME`.
        `options` override what the file says.

        Raises:
            DataError: the file is missing, broken, holds pickled objects or unknown arrays, or
                its content does not fit together.
        """
        from polytask.data.spike_checks import read_npz

        return read_npz(Path(path), options)

    @staticmethod
    def from_nwb(path: Path | str, dt: float = 0.01, **options: Any) -> Recording:
        """A recording from an NWB file (Neurodata Without Borders); needs the extra `neuro`.

        See `polytask.data.spikes_nwb.read_nwb` for the options.
        """
        from polytask.data.spikes_nwb import read_nwb

        return read_nwb(Path(path), dt, **options)

    @staticmethod
    def from_file(path: Path | str, **options: Any) -> Recording:
        """`from_npz` or `from_nwb`, by the file's ending."""
        place = Path(path)
        if place.suffix == ".npz":
            return Recording.from_npz(place, **options)
        if place.suffix == ".nwb":
            return Recording.from_nwb(place, **options)
        raise DataError(f"{place}: a recording is a .npz or an .nwb file")


def _range(start: int, stop: int | None, n_steps: int) -> tuple[int, int]:
    last = n_steps if stop is None else int(stop)
    if not 0 <= start < last <= n_steps:
        raise DataError(f"bins {start} to {last} are not within the recording's 0 to {n_steps}")
    return int(start), last


def _on_grid(first: int, ratio: Fraction, what: str) -> None:
    if (first * ratio.numerator) % ratio.denominator:
        step = ratio.denominator
        raise DataError(
            f"no {what} begins at bin {first}; start the slice at a multiple of {step} bins"
        )
