"""Exact shares: how many rows a group is due after n rows, in integers.

A share is a whole number of parts of a modulus, and all shares add up to the modulus. Shares that
are ratios of small numbers (uniform, proportional to sizes) get their own denominator and are
exact; all others get 2^63 parts, finer than a double. What a group is due after t rows is then
`rate * t / modulus`, kept as a whole number of rows and a part of one: floating point, whose error
grows with t, never decides which row comes next.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Parts = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

FINE = 1 << 63  # the modulus of shares that are not ratios of small numbers
COARSE_LIMIT = 1 << 31  # a denominator below this is a modulus of its own
_SAME = 4e-16  # relative distance at which two doubles count as one
_SHIFT31, _SHIFT32, _SHIFT63 = np.uint64(31), np.uint64(32), np.uint64(63)
_LOW31, _LOW32, _LOW63 = np.uint64(2**31 - 1), np.uint64(2**32 - 1), np.uint64(FINE - 1)


def advance(part: Parts, rate: Parts, time: Parts, modulus: int) -> tuple[Ints, Parts]:
    """(part + rate * time) divided by modulus: whole rows and the part left over. Exact.

    Arguments broadcast. `time` < 2^62 for the fine modulus and < 2^31 for a coarse one.
    """
    if modulus != FINE:
        total = part + rate * time
        return (total // np.uint64(modulus)).astype(np.int64), total % np.uint64(modulus)
    whole, left = _times(rate, time & _LOW31)
    if np.any(time > _LOW31):  # time = high * 2^31 + low
        high, rest = _times(rate, time >> _SHIFT31)
        shifted = (rest << _SHIFT31) & _LOW63
        whole = whole + (high << _SHIFT31) + (rest >> _SHIFT32)
        left = left + shifted
        whole, left = whole + (left >> _SHIFT63), left & _LOW63
    left = left + part
    return (whole + (left >> _SHIFT63)).astype(np.int64), left & _LOW63


def _times(rate: Parts, time: Parts) -> tuple[Parts, Parts]:
    """rate * time / 2^63 for time < 2^31, as (whole, part): a 128-bit product in two halves."""
    upper = (rate >> _SHIFT32) * time
    left = ((upper & _LOW31) << _SHIFT32) + (rate & _LOW32) * time
    return (upper >> _SHIFT31) + (left >> _SHIFT63), left & _LOW63


def crossing(part: Parts, rate: Parts, number: Ints, modulus: int) -> Ints:
    """The smallest time t >= 0 with part + rate * t >= number * modulus; shapes broadcast.

    A double gives the answer within one; exact arithmetic settles it. `rate` > 0, and t < 2^31.
    """
    need = number.astype(np.float64) * modulus - part.astype(np.float64)
    guess = np.maximum(np.ceil(need / rate.astype(np.float64)), 0.0)
    time = np.minimum(guess, 2.0**31 - 2).astype(np.uint64)
    below = advance(part, rate, time, modulus)[0] < number
    time = time + below.astype(np.uint64)
    earlier = np.where(time > 0, time - np.uint64(1), time)
    spare = (time > 0) & ~below & (advance(part, rate, earlier, modulus)[0] >= number)
    return np.where(spare, earlier, time).astype(np.int64)


@dataclass(frozen=True)
class Shares:
    """Shares of groups: `rate / modulus`, each group's rows per row drawn. They add up to one."""

    rate: Parts  # (groups,)
    modulus: int

    def due(self, time: int, part: Parts | None = None) -> tuple[Ints, Parts]:
        """What each group is due `time` rows on from `part`: whole rows and the part of one."""
        start = np.zeros_like(self.rate) if part is None else part
        return advance(start, self.rate, np.uint64(time), self.modulus)  # type: ignore[arg-type]

    def slots_until(self, rows: Ints, group: int) -> int:
        """The largest time at which `group` is due at most `rows[group]` rows."""
        return int(rows[group]) * self.modulus // int(self.rate[group])

    @property
    def weights(self) -> Floats:
        """The shares as doubles, (groups,)."""
        return self.rate.astype(np.float64) / float(self.modulus)


def fine_shares(weights: Floats) -> Shares:
    """Shares in 2^63 parts; rounding is at the expense of the largest. A weight > 0 gets some."""
    scaled = [int(w) for w in np.ldexp(weights / weights.max(), 62)]
    total = sum(scaled)
    rate = [max(s * FINE // total, int(w > 0)) for s, w in zip(scaled, weights)]
    rate[int(np.argmax(weights))] += FINE - sum(rate)
    return Shares(np.array(rate, dtype=np.uint64), FINE)


def coarse_shares(rows: Ints) -> Shares:
    """Shares that are whole numbers of rows out of their sum, exactly."""
    return Shares(rows.astype(np.uint64), int(rows.sum()))


def whole_numbers(weights: Floats) -> Ints | None:
    """Smallest whole numbers with the ratios of `weights` and a sum below 2^31, or None.

    The ratios have to agree to the precision of a double.
    """
    shares = weights / weights.sum()
    denominator = 1
    for share in np.unique(shares):
        denominator = math.lcm(denominator, _ratio(float(share)).denominator)
        if denominator >= COARSE_LIMIT:
            return None
    rows = np.rint(shares * denominator).astype(np.int64)
    close = np.abs(rows - shares * denominator) <= _SAME * shares * denominator
    if rows.sum() != denominator or not close.all():
        return None
    return np.asarray(rows // np.gcd.reduce(rows))


def _ratio(value: float) -> Fraction:
    """The simplest ratio that a double could stand for."""
    for bits in (10, 14, 17, 20, 23, 26):
        ratio = Fraction(value).limit_denominator(1 << bits)
        if abs(float(ratio) - value) <= _SAME * value:
            return ratio
    return Fraction(value)
