"""Random numbers by counter, for whole batches: draw j of row r is a function of (key, r, j).

So an example's noise depends on its number in the stream alone, never on what else is in its
batch, and nothing has to be replayed to resume. `polytask.rng` makes the key; SplitMix64's
finaliser (Steele, Lea and Flood, 2014) mixes row and column into it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from polytask import rng

Words = npt.NDArray[np.uint64]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_ROW, _COLUMN = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD1342543DE82EF95)
_MIX1, _MIX2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_U11, _U27, _U30, _U31 = (np.uint64(n) for n in (11, 27, 30, 31))


def words(seed: int, stream: str, rows: npt.ArrayLike, width: int) -> Words:
    """(n, width) uint64 for the rows (n,) of a stream."""
    numbers = np.asarray(rows, np.int64).astype(np.uint64)
    start = _mix(np.uint64(rng.derive(seed, stream)) + numbers * _ROW)
    out = start[:, None] + np.arange(1, width + 1, dtype=np.uint64) * _COLUMN
    return _mix(out)


def uniform(seed: int, stream: str, rows: npt.ArrayLike, width: int) -> Floats:
    """(n, width) float64 in [0, 1), 53 bits each."""
    return np.asarray((words(seed, stream, rows, width) >> _U11) * 2.0**-53, np.float64)


def below(seed: int, stream: str, rows: npt.ArrayLike, limit: npt.ArrayLike) -> Ints:
    """(n,) whole numbers, uniform over 0 .. limit - 1 (one limit, or one per row)."""
    u = uniform(seed, stream, rows, 1)[:, 0]
    top = np.asarray(limit, np.int64)
    return np.asarray(np.minimum(np.floor(u * top), top - 1), np.int64)


def choose(seed: int, stream: str, rows: npt.ArrayLike, among: int, count: int) -> Ints:
    """(n, count) distinct whole numbers below `among`, every set equally likely, ascending.

    Floyd's algorithm (Bentley and Floyd, 1987) for all rows at once: one draw per number chosen,
    however many there are to choose among.
    """
    numbers = np.asarray(rows, np.int64).reshape(-1)
    n = len(numbers)
    if count == 0 or count == among:
        return np.broadcast_to(np.arange(count), (n, count)).astype(np.int64)
    limits = np.arange(among - count, among, dtype=np.int64)
    u = uniform(seed, stream, numbers, count)
    drawn = np.minimum((u * (limits + 1)).astype(np.int64), limits)
    taken = np.zeros(n * among, np.bool_)
    base = np.arange(n, dtype=np.int64) * among
    out = np.empty((count, n), np.int64)
    for step, (limit, column) in enumerate(zip(limits.tolist(), np.ascontiguousarray(drawn.T))):
        # A number that was drawn before gives way to the newest one, which cannot have been.
        place = np.where(taken[base + column], limit, column)
        taken[base + place] = True
        out[step] = place
    return np.sort(out.T, axis=1)


def _mix(x: Words) -> Words:
    """SplitMix64's finaliser: a bijection in which every bit depends on all."""
    x = (x ^ (x >> _U30)) * _MIX1
    x = (x ^ (x >> _U27)) * _MIX2
    return np.asarray(x ^ (x >> _U31), np.uint64)
