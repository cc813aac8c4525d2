"""Intervals for a mean and for a difference of paired measurements.

Two sources of chance, two intervals: over seeds (few, from 2 up) Student's t, with the bootstrap
beside it; over examples (many) the paired bootstrap, vectorised. Everything is a function of its
arguments: the resampling is seeded, so the same numbers give the same interval on every machine.

Sources: Student (1908); Efron (1979); Hesterberg (2015), "What Teachers Should Know About the
Bootstrap", section 4.3 (expanded percentile interval); Holm (1979).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from polytask import rng

Floats = npt.NDArray[np.float64]
RESAMPLES = 10_000
_CHUNK = 4_000_000  # numbers held at once while resampling: 32 MB


@dataclass(frozen=True)
class Interval:
    """An estimate with its two-sided interval."""

    mean: float
    low: float
    high: float
    confidence: float
    n: int
    method: str  # 't' or 'bootstrap'

    def excludes(self, value: float) -> bool:
        """Whether `value` lies outside."""
        return value < self.low or value > self.high


def _sample(values: npt.ArrayLike, at_least: int) -> Floats:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1:
        raise ValueError(f"expected one value per measurement, got an array of shape {x.shape}")
    if x.size < at_least:
        raise ValueError(f"an interval needs at least {at_least} measurements, got {x.size}")
    if not np.isfinite(x).all():
        raise ValueError("an interval needs finite measurements, got NaN or infinity")
    return x


def _checked(confidence: float) -> float:
    if not 0.5 <= confidence < 1:
        raise ValueError(f"confidence is a share between 0.5 and 1, got {confidence}")
    return confidence


def t_interval(values: npt.ArrayLike, confidence: float = 0.95) -> Interval:
    """Student's interval of the mean of `values` (n,), n >= 2: mean +- t_{n-1} s / sqrt(n)."""
    from scipy.special import stdtrit

    x = _sample(values, at_least=2)
    half = float(stdtrit(x.size - 1, 0.5 + _checked(confidence) / 2))
    half *= float(x.std(ddof=1) / np.sqrt(x.size))
    mean = float(x.mean())
    return Interval(mean, mean - half, mean + half, confidence, x.size, "t")


def t_test(values: npt.ArrayLike) -> float:
    """Two-sided p-value of 'the mean is 0'. Without any spread: 1 at 0, else 0."""
    from scipy.special import stdtr

    x = _sample(values, at_least=2)
    error = float(x.std(ddof=1) / np.sqrt(x.size))
    mean = float(x.mean())
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    return float(2 * stdtr(x.size - 1, -abs(mean / error)))


def bootstrap_interval(
    values: npt.ArrayLike, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Expanded percentile bootstrap interval of the mean of `values` (n,), n >= 2.

    The plain percentile interval is too short in small samples by sqrt((n-1)/n) and by the normal
    quantile; the expanded one reads the resampled means at Phi(+-sqrt(n/(n-1)) t_{n-1}) instead.
    For large n both are the same.
    """
    x = _sample(values, at_least=2)
    means = resampled(x[:, None], lambda sums: sums[:, 0] / x.size, resamples, seed)
    low, high = percentile_limits(means, x.size, confidence)
    return Interval(float(x.mean()), low, high, confidence, x.size, "bootstrap")


def percentile_limits(draws: Floats, n: int, confidence: float) -> tuple[float, float]:
    """Expanded percentile limits of resampled estimates `draws` (resamples,) from n measurements.

    Undefined estimates (NaN: a resample without one of the classes, say) are left out as long as
    they are rarer than one in ten; otherwise the interval is NaN, NaN.
    """
    from scipy.special import ndtr, stdtrit

    defined = draws[np.isfinite(draws)]
    if defined.size < 0.9 * draws.size or n < 2:
        return float("nan"), float("nan")
    quantile = float(stdtrit(n - 1, 0.5 + _checked(confidence) / 2)) * np.sqrt(n / (n - 1))
    tail = float(ndtr(-quantile))
    low, high = np.quantile(defined, [tail, 1 - tail])
    return float(low), float(high)


def resampled(
    rows: Floats, finish: Callable[[Floats], Floats], resamples: int = RESAMPLES, seed: int = 0
) -> Floats:
    """Estimates on bootstrap resamples of `rows` (n, k).

    `finish` turns the column sums of each resample (r, k) into its estimate (r,). Rows are drawn
    whole, so several columns (two models, say) are resampled in pairs. Where many rows are equal
    they are drawn together (one multinomial over the distinct rows): the same distribution, and
    right-or-wrong scores become cheap at any n.
    """
    n = len(rows)
    distinct, counts = np.unique(rows, axis=0, return_counts=True)
    draws = rng.generator(seed, "bootstrap")
    parts = []
    if 20 * len(distinct) < n:
        for size in _chunks(resamples, len(distinct)):
            times = draws.multinomial(n, counts / n, size=size)
            parts.append(finish(times.astype(np.float64) @ distinct))
    else:
        for size in _chunks(resamples, n):
            index = draws.integers(0, n, size=(size, n))
            index += n * np.arange(size)[:, None]
            times = np.bincount(index.ravel(), minlength=size * n).reshape(size, n)
            parts.append(finish(times.astype(np.float64) @ rows))
    return np.concatenate(parts)


def resampled_indices(n: int, resamples: int, seed: int = 0) -> Iterator[npt.NDArray[np.int64]]:
    """Index sets (n,) drawn with replacement, one per resample: for measures of ranks."""
    draws = rng.generator(seed, "bootstrap")
    for _ in range(resamples):
        yield draws.integers(0, n, size=n)


def _chunks(total: int, width: int) -> Iterator[int]:
    size = max(1, _CHUNK // max(width, 1))
    for start in range(0, total, size):
        yield min(size, total - start)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given: p_(i) -> max_{j<=i} min(1, (m-j+1) p_(j)).

    Rejecting where the adjusted value is below alpha keeps the chance of any false claim among
    all m below alpha, whatever their dependence.
    """
    p = np.asarray(p_values, dtype=np.float64)
    if p.size and not ((p >= 0) & (p <= 1)).all():
        raise ValueError("p-values lie between 0 and 1")
    order = np.argsort(p, kind="stable")
    stepped = np.minimum(1.0, (p.size - np.arange(p.size)) * p[order])
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(stepped)
    return [float(value) for value in adjusted]
