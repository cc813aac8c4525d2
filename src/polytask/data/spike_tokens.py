"""Spikes as tokens: which unit fired, and when inside its window.

A window of population activity is a sentence `SOS s1 .. sK EOS PAD ..` over two vocabularies:

    identity   0 .. N-1 the units, then SOS, EOS, PAD                       (N + 3 entries)
    offset     0 .. M bins from the window's START, then SOS, EOS, PAD      (M + 4 entries)

with M = max(window, prev_window) / dt. SOS carries offset 0, EOS the offset EOS, PAD the offset
PAD. A bin that holds c spikes of a unit gives c equal tokens. Spikes stand in the order of their
bins and, within a bin, of their units.

Source: Neuroformer (Antoniades et al., ICLR 2024, arXiv 2311.00136), section 3.1, and the
authors' `data_utils.py`. Times are whole bins throughout: a time in seconds is no key.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from polytask.errors import ConfigError, DataError

Ints = NDArray[np.int64]

TRUNCATED_ALLOWED = 0.05  # share of spikes that may be lost to a full block


def whole_bins(seconds: float, dt: float, what: str) -> int:
    """How many bins of `dt` seconds a duration has.

    Raises:
        ConfigError: the duration is not a whole number of bins.
    """
    if not (np.isfinite(dt) and dt > 0):
        raise ConfigError(f"dt must be a positive number of seconds, not {dt}")
    if not (np.isfinite(seconds) and seconds >= 0):
        raise ConfigError(f"{what} must be a number of seconds from 0 on, not {seconds}")
    bins = round(seconds / dt)
    if abs(bins * dt - seconds) > 1e-6 * dt * max(bins, 1):
        raise ConfigError(
            f"{what} = {seconds} s is not a whole number of bins of dt = {dt} s; "
            f"{bins * dt:g} s would be"
        )
    return bins


@dataclass(frozen=True)
class TokenRows:
    """Tokenised windows, each as long as its block + 1.

    `ids`, `dts`: (B, block + 1) int64. `pad`: (B,) int64, how many PADs a row ends with.
    `spikes`, `kept`: (B,) int64, how many spikes a window has and how many found room.
    """

    ids: Ints
    dts: Ints
    pad: Ints
    spikes: Ints
    kept: Ints

    @property
    def truncated(self) -> float:
        """Share of all spikes that found no room."""
        spikes = int(self.spikes.sum())
        return float(spikes - self.kept.sum()) / max(1, spikes)


class SpikeTokenizer:
    """Windows of spikes as rows of tokens and back.

    Args:
        n_units: units (neurons) of the recording.
        dt: width of a bin, seconds.
        window: the current window, seconds; a whole number of bins.
        prev_window: the past window, which ends where the current one starts; 0 for none.
        block: tokens of a current window that the model reads. It holds `block - 2` spikes; of
            more, the latest are kept.
        prev_block: the same for the past window.
        official: as the published code, which on overflow cuts the identities but not the
            offsets, so that SOS carries the offset of the last spike that was dropped. The
            default keeps 0 there.
        allow_truncation: accept that more than 5 % of the spikes find no room.
    """

    def __init__(
        self,
        n_units: int,
        dt: float = 0.01,
        window: float = 0.05,
        prev_window: float = 0.05,
        block: int = 100,
        prev_block: int = 700,
        *,
        official: bool = False,
        allow_truncation: bool = False,
    ) -> None:
        if n_units < 1:
            raise ConfigError(f"n_units must be at least 1, not {n_units}")
        self.n_units, self.dt = int(n_units), float(dt)
        self.window, self.prev_window = float(window), float(prev_window)
        self.window_bins = whole_bins(window, dt, "window")
        self.prev_bins = whole_bins(prev_window, dt, "prev_window")
        if self.window_bins < 1:
            raise ConfigError(f"window = {window} s is shorter than one bin of {dt} s")
        for name, size in (("block", block), ("prev_block", prev_block)):
            if size < 3:
                raise ConfigError(
                    f"{name} = {size} has no room for SOS, EOS and one spike: 3 or more"
                )
        self.block, self.prev_block = int(block), int(prev_block)
        self.official, self.allow_truncation = official, allow_truncation
        self.sos, self.eos, self.pad = self.n_units, self.n_units + 1, self.n_units + 2
        self.n_ids = self.n_units + 3
        self.last_offset = max(self.window_bins, self.prev_bins)
        self.dt_sos, self.dt_eos, self.dt_pad = (self.last_offset + i for i in (1, 2, 3))
        self.n_dts = self.last_offset + 4

    def to_dict(self) -> dict[str, float | int | bool]:
        """The arguments, for a checkpoint; `SpikeTokenizer(**it)` gives an equal tokeniser."""
        names = ("n_units", "dt", "window", "prev_window", "block", "prev_block")
        flags = ("official", "allow_truncation")
        return {name: getattr(self, name) for name in (*names, *flags)}

    def rows(self, unit: Ints, step: Ints, starts: ArrayLike, past: bool = False) -> TokenRows:
        """Token rows of the windows that start at bins `starts`.

        Args:
            unit, step: (S,) int64, all spikes of the recording, ordered by (step, unit).
            starts: (B,) first bins of the CURRENT windows.
            past: rows of the windows before them instead, `[start - prev_bins, start)`.
        """
        first = np.atleast_1d(np.asarray(starts, np.int64))
        width, block = (self.prev_bins, self.prev_block) if past else (self.window_bins, self.block)
        if past:
            first = first - width
        low, high = np.searchsorted(step, first), np.searchsorted(step, first + width)
        spikes = (high - low).astype(np.int64)
        kept = np.minimum(spikes, block - 2)
        place = np.arange(block - 2)
        real = place < kept[:, None]
        ids = np.full((len(first), block + 1), self.pad, np.int64)
        dts = np.full((len(first), block + 1), self.dt_pad, np.int64)
        if len(step):
            take = np.minimum((high - kept)[:, None] + place, len(step) - 1)
            ids[:, 1:-2] = np.where(real, unit[take], self.pad)
            dts[:, 1:-2] = np.where(real, step[take] - first[:, None], self.dt_pad)
        ids[:, 0], dts[:, 0] = self.sos, 0
        if self.official:
            full = np.flatnonzero(spikes > kept)
            dts[full, 0] = step[high[full] - kept[full] - 1] - first[full]
        every = np.arange(len(first))
        ids[every, kept + 1], dts[every, kept + 1] = self.eos, self.dt_eos
        return TokenRows(ids, dts, block - 1 - kept, spikes, kept)

    def encode(self, raster: ArrayLike) -> TokenRows:
        """Token rows of windows given as counts, (N, w) or (B, N, w) with w = window / dt.

        Raises:
            DataError: another shape, negative or broken counts, or more than 5 % of the spikes
                without room.
        """
        counts = whole_counts(raster)
        counts = counts[None] if counts.ndim == 2 else counts
        if counts.ndim != 3 or counts.shape[1:] != (self.n_units, self.window_bins):
            raise DataError(
                f"windows must have the shape (B, {self.n_units} units, {self.window_bins} bins), "
                f"not {np.shape(raster)}"
            )
        flat = counts.transpose(1, 0, 2).reshape(self.n_units, -1)
        unit, step = raster_events(flat)
        rows = self.rows(unit, step, np.arange(len(counts)) * self.window_bins)
        self.check_room(rows, "the windows")
        return rows

    def decode(
        self, ids: ArrayLike, dts: ArrayLike, starts: ArrayLike | None = None
    ) -> tuple[Ints, Ints, Ints]:
        """The spikes in rows of tokens: their row, unit and bin, each (S,) int64, ordered so.

        A row ends at its first EOS or PAD; SOS and offsets that are no bin are skipped (a model
        may draw them). `starts`: (B,) bins to which the offsets are added; without it the bins
        count from each window's start.
        """
        identity, offset = np.asarray(ids, np.int64), np.asarray(dts, np.int64)
        if identity.ndim != 2 or identity.shape != offset.shape:
            raise DataError(
                f"ids {identity.shape} and dts {offset.shape} must be (B, tokens), both the same"
            )
        open_ = np.cumsum(identity >= self.eos, axis=1) == 0
        row, place = np.nonzero(open_ & (identity < self.n_units) & (offset <= self.last_offset))
        unit, step = identity[row, place], offset[row, place]
        if starts is not None:
            step = step + np.asarray(starts, np.int64)[row]
        order = np.lexsort((unit, step, row))
        return row[order].astype(np.int64), unit[order], step[order]

    def decode_raster(self, ids: ArrayLike, dts: ArrayLike) -> Ints:
        """Counts (B, N, w) of rows of tokens; spikes beyond the window's end are left out."""
        row, unit, step = self.decode(ids, dts)
        found = np.zeros((len(np.asarray(ids)), self.n_units, self.window_bins), np.int64)
        inside = step < self.window_bins
        np.add.at(found, (row[inside], unit[inside], step[inside]), 1)
        return found

    def check_room(self, rows: TokenRows, what: str) -> None:
        """Say which share of the spikes found no room; refuse more than 5 % unless allowed."""
        check_room(rows.truncated, what, self.allow_truncation)


def check_room(share: float, what: str, allowed: bool) -> None:
    """Warn of a truncated share; `DataError` above 5 % unless `allowed`."""
    if share <= 0:
        return
    said = f"{share:.2%} of the spikes in {what} find no room in their block and are dropped"
    if share > TRUNCATED_ALLOWED and not allowed:
        raise DataError(
            f"{said}; that is more than {TRUNCATED_ALLOWED:.0%}. Choose larger blocks or a shorter "
            "window, or pass allow_truncation=True"
        )
    warnings.warn(said, stacklevel=4)


def whole_counts(raster: ArrayLike) -> Ints:
    """A raster as int64.

    Raises:
        DataError: a count is negative, not finite or not a whole number.
    """
    given = np.asarray(raster)
    if given.dtype == object or not (
        np.issubdtype(given.dtype, np.number) or given.dtype == np.bool_
    ):
        raise DataError(f"a raster holds spike counts, not values of type {given.dtype}")
    if np.issubdtype(given.dtype, np.floating):
        wrong = ~np.isfinite(given)
        wrong |= np.where(wrong, 0.0, given) % 1 != 0
        if wrong.any():
            where = tuple(int(i) for i in np.argwhere(wrong)[0])
            raise DataError(
                f"spike counts must be whole numbers; the raster holds {given[where]} at {where}. "
                "Deconvolved traces have to be thresholded or rounded first"
            )
    if given.size and given.min() < 0:
        where = tuple(int(i) for i in np.argwhere(given < 0)[0])
        raise DataError(
            f"spike counts cannot be negative; the raster holds {given[where]} at {where}"
        )
    return given.astype(np.int64)


def raster_events(counts: Ints) -> tuple[Ints, Ints]:
    """(unit, step) of every spike of an (N, T) raster, ordered by (step, unit)."""
    step, unit = np.nonzero(counts.T)
    times = counts[unit, step]
    return np.repeat(unit, times).astype(np.int64), np.repeat(step, times).astype(np.int64)
