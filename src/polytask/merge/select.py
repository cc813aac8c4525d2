"""Exact order statistics and sums that come out the same streamed, chunked or in threads.

The k-th magnitude is found by counting, not by sorting: float32 numbers of one sign are ordered as
their bits are, so a histogram of the upper 16 bits finds the bin that holds the k-th value, and a
histogram of the lower 16 bits within that bin finds the value itself. Counts are integers: they
add up to the same total in any order, which makes a global quantile over tensors that are never in
memory together exact. Sums are taken over blocks of fixed size and then added exactly.

float64 values are compared at float32 precision (rounding keeps the order).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from polytask import rng

BINS = 1 << 16
BLOCK = 1 << 16  # elements handled at a time: few enough to stay in the processor's cache
ROW = 1 << 12  # elements whose sum is one float64 addend of `dot` and `mass`
HIGH = 1 if np.little_endian else 0  # where the upper half of a 32-bit word stands

Counts = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint32]


def blocks(count: int, size: int = BLOCK) -> Iterator[slice]:
    """Slices of at most `size` that cover range(count)."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def magnitude_words(x: Tensor) -> Words:
    """|x| as unsigned integers in the same order; a view's worth of work for float32 on the CPU."""
    flat = x.detach().reshape(-1).to("cpu", torch.float32).numpy()
    words: Words = np.ascontiguousarray(flat).view(np.uint32)
    return words & np.uint32(0x7FFF_FFFF)


def ordered_words(x: Tensor) -> Words:
    """Signed x as unsigned integers in the same order; -0 and 0 are one value."""
    flat = x.detach().reshape(-1).to("cpu", torch.float32).numpy()
    words = np.ascontiguousarray(flat + np.float32(0)).view(np.uint32)
    negative = (words >> np.uint32(31)).astype(bool)
    return np.where(negative, ~words, words | np.uint32(0x8000_0000))


def from_magnitude(word: int) -> float:
    """The magnitude that `magnitude_words` made into `word`."""
    return float(np.array([word], dtype=np.uint32).view(np.float32)[0])


def from_ordered(word: int) -> float:
    """The number that `ordered_words` made into `word`."""
    plain = word & 0x7FFF_FFFF if word >> 31 else ~word & 0xFFFF_FFFF
    return from_magnitude(plain)


def high_counts(words: Words) -> Counts:
    """(2^16,) how many words have each upper half."""
    total = np.zeros(BINS, dtype=np.int64)
    upper = np.ascontiguousarray(words).view(np.uint16)[HIGH::2]
    for block in blocks(len(upper)):
        total += np.bincount(upper[block], minlength=BINS)
    return total


def low_counts(words: Words, high: int) -> Counts:
    """(2^16,) how many of the words with upper half `high` have each lower half."""
    halves = np.ascontiguousarray(words).view(np.uint16)
    lower = halves[1 - HIGH :: 2][halves[HIGH::2] == high]
    return np.bincount(lower, minlength=BINS).astype(np.int64)


def find_bin(counts: Counts, rank: int) -> tuple[int, int]:
    """The bin that holds the value of `rank` (0 is the smallest), and its rank within the bin."""
    below = np.cumsum(counts)
    if not 0 <= rank < below[-1]:
        raise IndexError(f"rank {rank} of {below[-1]} values")
    place = int(np.searchsorted(below, rank, side="right"))
    return place, rank - int(below[place] - counts[place])


def kth_magnitudes(x: Tensor, *ranks: int) -> list[float]:
    """The |x| of each rank in ascending order, 0 the smallest; exact, and without sorting.

    On other devices than the CPU torch's own selection is used; the values are the same.
    """
    if not all(0 <= rank < x.numel() for rank in ranks):
        raise IndexError(f"ranks {ranks} of {x.numel()} values")
    if x.device.type != "cpu":
        flat = x.detach().abs().float().flatten()
        return [float(flat.kthvalue(rank + 1).values) for rank in ranks]
    words = magnitude_words(x)
    counts = high_counts(words)
    halves = words.view(np.uint16)
    found = []
    for rank in ranks:
        high, rest = find_bin(counts, rank)
        lower = halves[1 - HIGH :: 2][halves[HIGH::2] == high]
        found.append(from_magnitude(high << 16 | int(np.partition(lower, rest)[rest])))
    return found


def kth_magnitude(x: Tensor, rank: int) -> float:
    """`kth_magnitudes` for one rank."""
    return kth_magnitudes(x, rank)[0]


def kept(count: int, density: float) -> int:
    """How many of `count` values a density keeps: the fraction rounded down, but at least one."""
    return min(count, max(1, int(density * count)))


def keep_largest_(x: Tensor, density: float) -> Tensor:
    """Zero all but the `density` largest magnitudes of `x`, in place.

    Everything at or above the k-th largest magnitude stays, k = `kept(n, density)`; of several
    equal magnitudes at the threshold all stay, where `mergekit.sparsify.magnitude` and PEFT keep
    whichever their sort happens to put first.
    """
    if density >= 1 or not x.numel():
        return x
    return zero_below_(x, kth_magnitude(x, x.numel() - kept(x.numel(), density)))


def zero_below_(x: Tensor, threshold: float) -> Tensor:
    """Zero every |x| < threshold, in place; the comparison is made at float32 precision."""
    if threshold <= 0:
        return x
    if x.dtype == torch.float32:
        # hardshrink keeps |x| > limit: the float32 just below the threshold makes that >=.
        limit = float(np.nextafter(np.float32(threshold), np.float32(0)))
        return torch.hardshrink(x, limit, out=x)
    return x.mul_(x.abs().float().ge_(threshold))


def mass(x: Tensor) -> float:
    """sum |x|, independent of threads: float64 sums of fixed rows, added exactly."""
    return math.fsum(value for rows in _rows(x) for value in _sums(rows.abs()))


def dot(x: Tensor, y: Tensor) -> float:
    """sum x y, independent of threads: float64 sums of fixed rows, added exactly."""
    pairs = zip(_rows(x), _rows(y), strict=True)
    return math.fsum(value for a, b in pairs for value in _sums(a * b))


def _rows(x: Tensor) -> Iterator[Tensor]:
    flat = x.reshape(-1)
    whole = flat.numel() // ROW * ROW
    for block in blocks(whole, ROW * 64):
        yield flat[block].view(-1, ROW)
    if whole < flat.numel():
        yield flat[whole:][None]


def _sums(rows: Tensor) -> list[float]:
    return rows.sum(1, dtype=torch.float64).tolist()


def uniform_words(count: int, offset: int, seed: int, *keys: rng.Key) -> Words:
    """(count,) uniform 32-bit numbers: elements offset ... of the stream named by the keys.

    Philox is counter-based: an element's number depends on its place alone, so that a chunk gets
    the numbers that it would get within the whole tensor.
    """
    source = rng.generator(seed, *keys).bit_generator
    if not isinstance(source, np.random.Philox):
        raise TypeError("chunks need a counter-based generator")
    skipped = offset % 8  # one step of the counter gives four 64-bit words
    source.advance(offset // 8)
    words: Words = source.random_raw((skipped + count + 1) // 2).view(np.uint32)
    return words[skipped : skipped + count]


def uniform(count: int, offset: int, seed: int, *keys: rng.Key) -> Tensor:
    """(count,) float32 in [0, 1) with 24 random bits, by place as `uniform_words`."""
    words = uniform_words(count, offset, seed, *keys)
    return torch.from_numpy((words >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24))


def add_counts(one: Sequence[Counts], other: Sequence[Counts]) -> list[Counts]:
    """Histogram by histogram sum, in the memory of `one`."""
    return [np.add(a, b, out=a) for a, b in zip(one, other, strict=True)]
