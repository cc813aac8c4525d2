"""The seasonal naive forecast: what happened one season ago. The yardstick of every other."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def seasonal_naive(past: Floats, season: int, horizon: int) -> Floats:
    """(n, horizon, channels): the last observed value of the same place in the season.

    Args:
        past: (n, length, channels), NaN where missing.
        season: steps in a season; 1 repeats the last observed value.

    A place in the season that was never observed takes the last observed value of all; a channel
    without any observation is forecast as NaN.
    """
    n, length, channels = past.shape
    cycles = -(-length // season)
    padded = np.full((n, cycles * season, channels), np.nan, past.dtype)
    padded[:, cycles * season - length :] = past
    places = _last_seen(padded.reshape(n, cycles, season, channels))  # (n, season, channels)
    overall = _last_seen(past)[:, None]
    places = np.where(np.isfinite(places), places, overall)
    return places[:, np.arange(horizon) % season]


def _last_seen(values: Floats) -> Floats:
    """Last finite value along axis 1, NaN where there is none."""
    seen = np.isfinite(values)
    last = values.shape[1] - 1 - seen[:, ::-1].argmax(1)
    return np.take_along_axis(values, last[:, None], axis=1)[:, 0]
