"""A shuffled order of N rows in which any position can be computed alone.

A Feistel network over pairs (left, right) is a bijection whatever its round function is; positions
that land outside 0..N-1 are sent through it again (cycle walking), which makes it a bijection of
0..N-1 (Black and Rogaway, 2002). The pairs are taken from Z_a x Z_b with a*b just above N, so that
walking is rare. Nothing is stored: the order is a function of (seed, group, epoch).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from polytask import rng

_ROUNDS = 8
_LEAST = 6  # smaller halves would reach too few of the orders of a handful of rows
_MIX1, _MIX2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_STEP = np.uint64(0x9E3779B97F4A7C15)
_FACTORS = [np.uint64(rng.derive(0, "feistel", turn) * 2 + 1) for turn in range(_ROUNDS)]
_U27, _U30, _U31, _U32 = (np.uint64(n) for n in (27, 30, 31, 32))

Words = npt.NDArray[np.uint64]


def permute(
    seed: int,
    group: npt.ArrayLike,
    epoch: npt.ArrayLike,
    position: npt.ArrayLike,
    size: npt.ArrayLike,
) -> npt.NDArray[np.int64]:
    """Row at `position` in the shuffled order of `size` rows, keyed by seed, group and epoch.

    Arguments after `seed` are integers or arrays and broadcast; 0 <= position < size < 2^62.
    For fixed seed, group and epoch every row comes at exactly one position.
    """
    words = [np.asarray(x).astype(np.uint64) for x in (group, epoch, position, size)]
    arrays: list[Words] = list(np.broadcast_arrays(*words))
    shape = arrays[0].shape
    groups, epochs, here, sizes = (array.ravel() for array in arrays)
    if bool((here >= sizes).any()):
        raise ValueError("a position lies beyond the size")
    base: Words = np.full(here.shape, rng.derive(seed, "shuffle"), dtype=np.uint64)
    key = _mix(_mix(base + groups * _STEP) + epochs * _STEP)
    out = _feistel(here, sizes, key)
    astray = np.flatnonzero(out >= sizes)
    while astray.size:
        out[astray] = _feistel(out[astray], sizes[astray], key[astray])
        astray = astray[out[astray] >= sizes[astray]]
    return out.astype(np.int64).reshape(shape)


def _feistel(value: Words, size: Words, key: Words) -> Words:
    """One pass over Z_a x Z_b, a about sqrt(size), b = ceil(size / a); both at least `_LEAST`."""
    a = np.maximum(np.sqrt(size.astype(np.float64)), _LEAST).astype(np.uint64)
    b = np.maximum((size + a - np.uint64(1)) // a, np.uint64(_LEAST))
    right = value // a
    left = value - right * a
    halves, limits = (left, right), (a, b)
    word, spare = np.empty_like(value), np.empty_like(value)
    for turn in range(_ROUNDS):  # one half moves by a keyed function of the other
        half, limit = halves[turn % 2], limits[turn % 2]
        np.bitwise_xor(halves[1 - turn % 2], key, out=word)
        word *= _FACTORS[turn]
        np.right_shift(word, _U32, out=spare)
        word ^= spare
        word *= _MIX2
        word >>= _U32
        word *= limit
        word >>= _U32  # below limit < 2^32
        half += word
        np.subtract(half, limit, out=spare)  # wraps to a huge number where half < limit
        np.minimum(half, spare, out=half)
    return np.asarray(left + right * a)


def _mix(x: Words) -> Words:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): every bit depends on all."""
    x = (x ^ (x >> _U30)) * _MIX1
    x = (x ^ (x >> _U27)) * _MIX2
    return x ^ (x >> _U31)
