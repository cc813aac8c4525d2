"""Synthetic series for pretraining: seasons, trend, autocorrelation and level shifts.

    y = level + trend t + sum of 1-3 seasons (each with harmonics) + AR(1) noise + level shifts

A series is a function of (seed, frequency, its number's block), so more of them never change the
first ones. Source of the recipe: the volume that arXiv 2401.03955 takes from public archives,
replaced by structure that can be written down.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from polytask import rng
from polytask.data.calendar import Frequency
from polytask.data.windows import Record
from polytask.errors import DataError

Floats = NDArray[np.float64]

SEASONS: dict[str, tuple[float, ...]] = {
    "15min": (96, 672, 48),
    "30min": (48, 336, 24),
    "h": (24, 168, 12),
    "D": (7, 365.25, 30.4),
    "W": (52.18, 13, 26.1),
    "M": (12, 6, 4),
    "Q": (4, 2, 20),
}
"""Periods in steps, the usual season first; it is in nine of ten series."""
_BLOCK = 64  # series drawn from one stream


def generate(
    frequency: str, count: int, length: int, seed: int = 0, season: float = 0.9
) -> list[Record]:
    """`count` series of `length` steps at a frequency of `SEASONS`.

    Args:
        season: chance that a series has the frequency's usual season.

    Raises:
        DataError: no seasons are known for the frequency, or count or length is not positive.
    """
    if frequency not in SEASONS:
        raise DataError(f"no generator for frequency '{frequency}' (has: {', '.join(SEASONS)})")
    if count < 1 or length < 1:
        raise DataError(f"count = {count}, length = {length}: both should be at least 1")
    blocks = [
        _block(rng.generator(seed, "series", frequency, number), SEASONS[frequency], length, season)
        for number in range(-(-count // _BLOCK))
    ]
    values = np.concatenate(blocks)[:count].astype(np.float32)
    step = Frequency.named(frequency)
    return [Record(row[:, None], step) for row in values]


def _block(
    random: np.random.Generator, periods: tuple[float, ...], length: int, season: float
) -> Floats:
    """(_BLOCK, length) series."""
    time = np.arange(length)
    n = _BLOCK
    values = random.normal(0, 0.6, (n, 1)) * time / max(length / 3, 1)  # trend
    present = random.random((n, len(periods))) < np.array([season, 0.5, 0.25])[: len(periods)]
    strength = present * random.gamma(2.0, 0.6, (n, len(periods)))
    phase = random.random((n, len(periods)))
    for k, period in enumerate(periods):
        values += strength[:, k : k + 1] * _wave(random, time / period + phase[:, k : k + 1])
    values *= 1 + 0.15 * random.normal(size=(n, 1)) * time / length  # seasons that grow or fade
    return values + _noise(random, n, length) + _shifts(random, n, length)


def _wave(random: np.random.Generator, turns: Floats) -> Floats:
    """One season: five harmonics of falling size, the same shape in every cycle."""
    out = np.zeros_like(turns)
    for harmonic in range(1, 6):
        size = random.normal(size=(len(turns), 1)) / harmonic if harmonic > 1 else 1.0
        shift = random.random((len(turns), 1))
        out += size * np.sin(2 * np.pi * (harmonic * turns + shift))
    return out


def _noise(random: np.random.Generator, n: int, length: int) -> Floats:
    """AR(1) with coefficients from none to nearly a random walk, one filter for all series."""
    coefficient = random.choice([0.0, 0.3, 0.6, 0.9, 0.98], (n, 1))
    size = random.gamma(1.5, 0.25, (n, 1)) * np.sqrt(1 - coefficient**2)
    shocks = random.normal(size=(n, length)) * size
    state = np.zeros(n)
    out = np.empty((n, length))
    for step in range(length):  # the recursion is over time; every step is over all series
        state = coefficient[:, 0] * state + shocks[:, step]
        out[:, step] = state
    return out


def _shifts(random: np.random.Generator, n: int, length: int) -> Floats:
    """A third of the series change their level once or twice, for good."""
    jump = random.normal(0, 1.5, (n, 2)) * (random.random((n, 2)) < (0.3, 0.1))
    when = random.integers(0, length, (n, 2))
    return np.asarray((jump[:, :, None] * (np.arange(length) >= when[:, :, None])).sum(1))
