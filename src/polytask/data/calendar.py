"""The time axis of a series: which frequency its stamps have, on which grid, and what is missing.

Stamps are turned into integers on the frequency's own grid (months since year 0 for monthly data,
multiples of the step otherwise), so gaps, duplicates and irregular stamps are integer questions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from polytask.errors import DataError

Stamps = NDArray[np.datetime64]
Ints = NDArray[np.int64]

# Names of resolutions with their token; up to the week as in granite-tsfm, coarser ones are ours.
TOKENS: dict[str, int] = {
    "other": 0,
    "min": 1,
    "2min": 2,
    "5min": 3,
    "10min": 4,
    "15min": 5,
    "30min": 6,
    "h": 7,
    "D": 8,
    "W": 9,
    "M": 10,
    "Q": 11,
    "Y": 12,
    "s": 13,
}
_SECONDS = {
    "s": 1,
    "min": 60,
    "2min": 120,
    "5min": 300,
    "10min": 600,
    "15min": 900,
    "30min": 1800,
    "h": 3600,
    "D": 86400,
    "W": 604800,
}
_MONTHS = {"M": 1, "Q": 3, "Y": 12}
# Usual number of steps in a season, for the seasonal naive forecast and the scale of MASE.
SEASONS = {
    "s": 60,
    "min": 60,
    "2min": 30,
    "5min": 12,
    "10min": 144,
    "15min": 96,
    "30min": 48,
    "h": 24,
    "D": 7,
    "W": 52,
    "M": 12,
    "Q": 4,
    "Y": 1,
}


@dataclass(frozen=True)
class Frequency:
    """A step in time: `count` seconds, or `count` calendar months."""

    unit: str  # 'seconds' or 'months'
    count: int

    @property
    def name(self) -> str:
        """'h', '30min', 'D', 'W', 'M', 'Q', 'Y' ... or the plain step ('7200s', '2M')."""
        known = _SECONDS if self.unit == "seconds" else _MONTHS
        for name, size in known.items():
            if size == self.count:
                return name
        return f"{self.count}s" if self.unit == "seconds" else f"{self.count}M"

    @property
    def token(self) -> int:
        """Resolution token for models with a resolution prefix; 0 for steps without a name."""
        return TOKENS.get(self.name, 0)

    @property
    def season(self) -> int:
        """Steps in the usual season; 1 where there is none."""
        return SEASONS.get(self.name, 1)

    @classmethod
    def named(cls, name: str) -> Frequency:
        """From 'h', '30min', 'D', 'W', 'M', 'Q', 'Y', '7200s', '2M' (pandas' 'MS', 'ME' too)."""
        from polytask.errors import suggestion

        short = {"MS": "M", "ME": "M", "QS": "Q", "QE": "Q", "YS": "Y", "YE": "Y", "H": "h"}
        plain = short.get(name.split("-")[0], name.split("-")[0])
        if plain in _SECONDS:
            return cls("seconds", _SECONDS[plain])
        if plain in _MONTHS:
            return cls("months", _MONTHS[plain])
        for suffix, unit in (("s", "seconds"), ("M", "months")):
            if plain.endswith(suffix) and plain[: -len(suffix)].isdigit():
                return cls(unit, int(plain[: -len(suffix)]))
        raise DataError(f"unknown frequency '{name}'.{suggestion(name, [*_SECONDS, *_MONTHS])}")

    def positions(self, stamps: Stamps) -> Ints:
        """Integer grid position of each stamp, relative to the first.

        Raises:
            DataError: a stamp lies off the grid; the message names the first such stamp.
        """
        if self.unit == "seconds":
            seconds = stamps.astype("datetime64[s]").astype(np.int64)
            offset = seconds - seconds[0]
        else:
            offset = stamps.astype("datetime64[M]").astype(np.int64)
            offset = offset - offset[0]
        bad = np.flatnonzero(offset % self.count)
        if self.unit == "months":
            bad = np.union1d(bad, np.flatnonzero(~_same_place_in_month(stamps)))
        if bad.size:
            raise DataError(
                f"irregular timestamp {show(stamps[bad[0]])}: not a multiple of the step "
                f"'{self.name}' after {show(stamps[0])}. Give `frequency`, or resample the series"
            )
        return np.asarray(offset // self.count, dtype=np.int64)

    def after(self, last: np.datetime64, steps: int) -> Stamps:
        """The `steps` stamps that follow `last`; month ends stay month ends."""
        ahead = np.arange(1, steps + 1)
        if self.unit == "seconds":
            start = last.astype("datetime64[s]")
            return np.asarray(start + ahead * np.timedelta64(self.count, "s"))
        day = last.astype("datetime64[D]")
        month = last.astype("datetime64[M]")
        months = month + ahead * np.timedelta64(self.count, "M")
        ends = (months + 1).astype("datetime64[D]") - 1
        if day == (month + 1).astype("datetime64[D]") - 1:
            return np.asarray(ends.astype("datetime64[s]"))
        offset = day - month.astype("datetime64[D]")
        days = np.minimum(months.astype("datetime64[D]") + offset, ends)
        return np.asarray(days.astype("datetime64[s]"))


def infer(stamps: Stamps) -> Frequency:
    """The step of sorted distinct stamps: the most common distance between neighbours.

    Raises:
        DataError: fewer than three stamps, or no distance is common to at least half of them.
    """
    if len(stamps) < 3:
        raise DataError(
            f"a frequency cannot be inferred from {len(stamps)} timestamps; give `frequency`"
        )
    days = np.diff(stamps.astype("datetime64[D]").astype(np.int64))
    if days.min() >= 28 and _same_place_in_month(stamps).all():
        months = stamps.astype("datetime64[M]").astype(np.int64)
        return Frequency("months", _most_common(months, stamps))
    seconds = stamps.astype("datetime64[s]").astype(np.int64)
    return Frequency("seconds", _most_common(seconds, stamps))


def _most_common(positions: Ints, stamps: Stamps) -> int:
    steps = np.diff(positions)
    sizes, counts = np.unique(steps, return_counts=True)
    best = int(counts.argmax())
    if counts[best] * 2 < len(steps):
        odd = int(np.flatnonzero(steps != sizes[best])[0]) + 1
        raise DataError(
            f"the timestamps have no common step: {show(stamps[odd - 1])} is followed by "
            f"{show(stamps[odd])}. Give `frequency`, or resample the series"
        )
    return int(sizes[best])


def _same_place_in_month(stamps: Stamps) -> NDArray[np.bool_]:
    """Whether each stamp has the first one's day of month, or is a month's end as the first is."""
    day = stamps.astype("datetime64[D]")
    month = stamps.astype("datetime64[M]")
    offset = (day - month.astype("datetime64[D]")).astype(np.int64)
    is_end = day == (month + 1).astype("datetime64[D]") - 1
    same_day = (offset == offset[0]) | (is_end & (offset < offset.max()))
    return np.asarray(same_day | (is_end & bool(is_end[0])))


def show(stamp: np.datetime64) -> str:
    """As messages write it; midnight is left out."""
    return str(stamp.astype("datetime64[s]")).replace("T", " ").removesuffix(" 00:00:00")
