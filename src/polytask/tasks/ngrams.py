"""Hashes of words, word n-grams and character shingles of many texts at once, in NumPy.

A polynomial hash over a whole buffer, modulo 2^64, gives the hash of any span from two prefix
sums; the multiplier is odd, so its powers have inverses. A final mixing step spreads the bits.
Two different spans get one number with a chance of about 2^-64 (adversarial texts aside).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from polytask.tasks.hashing import Hashes, mix

Ints = npt.NDArray[np.int64]

_WORD = re.compile(r"\w+")
_MULTIPLIER = 0x9E3779B97F4A7C15
_INVERSE = pow(_MULTIPLIER, -1, 1 << 64)
CHARACTERS_AT_ONCE = 2_000_000


def normal(text: str) -> str:
    """Words in lower case with single spaces; punctuation only where there is nothing else."""
    words = _WORD.findall(text.casefold())
    return " ".join(words) if words else text.strip()


def shingles(
    texts: Sequence[str], words: int, characters: int
) -> tuple[Hashes, Ints, npt.NDArray[np.bool_]]:
    """Hashes of all n-grams of all texts, the text each is from, and whether it is of words.

    Texts (normalised before) of at least `words` words give word n-grams; shorter ones give
    character n-grams of length `characters`, or nothing if they are shorter than that.
    """
    found: list[tuple[Hashes, Ints, bool]] = []
    start = 0
    while start < len(texts):
        stop, size = start, 0
        while stop < len(texts) and (stop == start or size < CHARACTERS_AT_ONCE):
            size += len(texts[stop]) + 1
            stop += 1
        piece = texts[start:stop]
        numbers = np.arange(start, stop, dtype=np.int64)
        long = np.array([text.count(" ") + 1 >= words for text in piece])
        for kind, hasher, length in ((True, _word_grams, words), (False, _char_grams, characters)):
            chosen = [text for text, is_long in zip(piece, long, strict=True) if is_long == kind]
            if chosen:
                hashes, row = hasher(chosen, length)
                found.append((hashes, numbers[long == kind][row], kind))
        start = stop
    return (
        np.concatenate([np.zeros(0, np.uint64), *(h for h, _, _ in found)]),
        np.concatenate([np.zeros(0, np.int64), *(r for _, r, _ in found)]),
        np.concatenate([np.zeros(0, bool), *(np.full(len(h), k) for h, _, k in found)]),
    )


def _word_grams(texts: Sequence[str], length: int) -> tuple[Hashes, Ints]:
    codes = _codes(texts)
    ends = np.flatnonzero((codes == 32) | (codes == 10))
    starts = np.r_[0, ends[:-1] + 1]
    newline = codes[ends] == 10
    row = np.cumsum(newline) - newline
    full = ends > starts
    words = _spans(mix(codes.astype(np.uint64), 1), starts[full], ends[full])
    return _grams(words, row[full], length)


def _char_grams(texts: Sequence[str], length: int) -> tuple[Hashes, Ints]:
    codes = _codes(texts)
    newline = codes == 10
    row = np.cumsum(newline) - newline
    kept = ~newline
    return _grams(mix(codes[kept].astype(np.uint64), 2), row[kept], length)


def _codes(texts: Sequence[str]) -> npt.NDArray[np.uint32]:
    """Code points of the texts, a line feed after each."""
    joined = "\n".join(text.replace("\n", " ") for text in texts) + "\n"
    return np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32)


def _grams(values: Hashes, row: Ints, length: int) -> tuple[Hashes, Ints]:
    """Hashes of `length` neighbouring values that stand in one row."""
    if len(values) < length:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    starts = np.flatnonzero(row[: len(row) - length + 1] == row[length - 1 :])
    return _spans(values, starts, starts + length), row[starts]


def _spans(values: Hashes, starts: Ints, ends: Ints) -> Hashes:
    """Hash of values[start:end] for every span."""
    with np.errstate(over="ignore"):
        prefix = np.zeros(len(values) + 1, np.uint64)
        np.cumsum(values * _powers(_MULTIPLIER, len(values)), out=prefix[1:])
        spans = (prefix[ends] - prefix[starts]) * _powers(_INVERSE, len(values) + 1)[starts]
        return mix(spans + (ends - starts).astype(np.uint64), 3)


def _powers(base: int, count: int) -> Hashes:
    """base^0, base^1, ... modulo 2^64."""
    factors = np.full(count, base, np.uint64)
    if count:
        factors[0] = 1
    return np.cumprod(factors, dtype=np.uint64)
