"""Links texts that nearly repeat one another, so that a split does not part them.

Two texts are alike when at least half of the different character 8-grams of both together stand
in both (resemblance of shingles, Broder 1997): "Enter a valid URL." and "Enter a valid URL here.",
singular and plural, a docstring copied with one word changed. Boilerplate is not counted.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt

from polytask.data.embedded.splits import Linked, normal

SHINGLE = 8
RESEMBLANCE = 0.5
READ = 300
"""Characters of a text that are compared: its beginning, where copies agree."""
COMMON = 40
"""A shingle in more texts than this is boilerplate."""

Ints = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]
_MULTIPLIER = 0x9E3779B97F4A7C15


def link_similar(linked: Linked, keys: Sequence[Hashable], texts: Sequence[str]) -> None:
    """Join the keys of texts that are alike; texts shorter than a shingle link when equal."""
    hashes, text = _rare(*_shingles([normal(text)[:READ] for text in texts]))
    size = np.bincount(text, minlength=len(texts))
    one, other, shared = _pairs(hashes, text, len(texts))
    alike = shared >= RESEMBLANCE * (size[one] + size[other] - shared)
    for first, second in zip(one[alike].tolist(), other[alike].tolist(), strict=True):
        linked.join(keys[first], keys[second])


def _shingles(texts: Sequence[str]) -> tuple[Hashes, Ints]:
    """Different shingles of each text, ordered by hash, then text. Short texts give one."""
    padded = [text.ljust(SHINGLE, "\0") for text in texts]
    letters = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), "<u4")
    lengths = np.array([len(text) for text in padded], np.int64)
    owner = np.repeat(np.arange(len(texts)), lengths)
    places = max(0, len(letters) - SHINGLE + 1)
    hashes = np.zeros(places, np.uint64)
    for offset in range(SHINGLE):  # wraps around, as it should
        hashes = (hashes + letters[offset : offset + places]) * np.uint64(_MULTIPLIER)
        hashes ^= hashes >> np.uint64(29)
    inside = owner[:places] == owner[SHINGLE - 1 :]
    hashes, owner = hashes[inside], owner[:places][inside]
    order = np.lexsort((owner, hashes))
    hashes, owner = hashes[order], owner[order]
    new = np.ones(len(hashes), bool)
    new[1:] = (hashes[1:] != hashes[:-1]) | (owner[1:] != owner[:-1])
    return hashes[new], owner[new]


def _rare(hashes: Hashes, text: Ints) -> tuple[Hashes, Ints]:
    """Without boilerplate; the order is kept."""
    starts = np.flatnonzero(np.r_[True, hashes[1:] != hashes[:-1]])
    sizes = np.diff(np.r_[starts, len(hashes)])
    kept = np.repeat(sizes <= COMMON, sizes)
    return hashes[kept], text[kept]


def _pairs(hashes: Hashes, text: Ints, count: int) -> tuple[Ints, Ints, Ints]:
    """Texts with shingles in common, and how many."""
    found = [np.zeros(0, np.int64)]
    for step in range(1, COMMON):
        same = hashes[step:] == hashes[:-step]
        if not same.any():
            break
        found.append(text[:-step][same] * count + text[step:][same])
    pairs, shared = np.unique(np.concatenate(found), return_counts=True)
    return pairs // count, pairs % count, shared
