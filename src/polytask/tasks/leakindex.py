"""What was trained on, as sorted hashes: exact contents and n-grams, with group and row.

Lookups are binary searches over whole arrays of judged hashes at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from polytask.tasks.hashing import Hashes, mix
from polytask.tasks.ngrams import shingles

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Found = list[tuple[int, int, int]]  # judged row, train group, train row

TRIED = 3  # train rows a short text is compared with: those that share its rarest shingle
MOST_SHINGLES = 30_000_000  # kept of the train splits; beyond, a hash picks every 2nd, 4th ...


@dataclass(frozen=True)
class Grams:
    """Distinct n-grams of some texts, ordered by text."""

    hashes: Hashes
    row: Ints
    of_words: Mask


class LeakIndex:
    """Add the train splits, `close`, then look judged rows up."""

    def __init__(self, words: int, characters: int, overlap: float) -> None:
        self.words, self.characters, self.overlap = words, characters, overlap
        self.every = 1
        self._exact: list[tuple[Hashes, Ints, Ints]] = []
        self._grams: list[tuple[Hashes, Ints, Ints]] = []
        self._held = 0

    def add(self, group: int, start: int, hashes: Hashes, texts: Sequence[str]) -> None:
        """Rows `start`, `start` + 1, ... of a group's train split: content hashes and texts."""
        rows = np.arange(start, start + len(hashes), dtype=np.int64)
        self._exact.append((hashes, np.full(len(hashes), group, np.int64), rows))
        grams = self.grams(texts)
        owner = np.full(len(grams.row), group, np.int64)
        self._grams.append((grams.hashes, owner, grams.row + start))
        self._held += len(grams.row)
        while self._held > MOST_SHINGLES:  # the same hashes are picked on both sides
            self.every *= 2
            self._grams = [self._sampled(*part) for part in self._grams]
            self._held = sum(len(part[0]) for part in self._grams)

    def _sampled(self, hashes: Hashes, group: Ints, row: Ints) -> tuple[Hashes, Ints, Ints]:
        kept = hashes % np.uint64(self.every) == 0
        return hashes[kept], group[kept], row[kept]

    def grams(self, texts: Sequence[str]) -> Grams:
        """Distinct n-grams per text, sampled as the index is."""
        hashes, row, of_words = shingles(texts, self.words, self.characters)
        kept = hashes % np.uint64(self.every) == 0
        hashes, row, of_words = hashes[kept], row[kept], of_words[kept]
        order = np.lexsort((hashes, row))
        hashes, row, of_words = hashes[order], row[order], of_words[order]
        new = np.ones(len(hashes), bool)
        new[1:] = (hashes[1:] != hashes[:-1]) | (row[1:] != row[:-1])
        return Grams(hashes[new], row[new], of_words[new])

    def close(self) -> None:
        """Sort; nothing can be added afterwards."""
        self.exact = _Sorted(self._exact)
        self._shingles = _Sorted(self._grams)
        places = _place(self._shingles.group, self._shingles.row)
        self._members = np.sort(_pair(self._shingles.hashes, places))
        self._places, self._sizes = np.unique(places, return_counts=True)
        self._exact, self._grams = [], []

    def equal(self, hashes: Hashes, own: int, same: bool) -> Found:
        """Judged rows whose content stands in training of group `own` (same) or of another."""
        at = self.exact.find(hashes, own, same)
        hit = np.flatnonzero(at >= 0)
        return _found(hit, self.exact.group[at[hit]], self.exact.row[at[hit]])

    def overlaps(self, grams: Grams, size: int, own: int, same: bool) -> Found:
        """Judged rows (of `size`) that overlap with training: see `leaks`."""
        at = self._shingles.find(grams.hashes, own, same)
        hit = at >= 0
        total = np.bincount(grams.row, minlength=size)
        hits = np.bincount(grams.row[hit], minlength=size)
        over = (total > 0) & (hits >= self.overlap * total)
        long = np.zeros(size, bool)
        long[grams.row[grams.of_words]] = True
        chosen = hit & (over & long)[grams.row]
        rows, first = np.unique(grams.row[chosen], return_index=True)
        places = at[chosen][first]
        found = _found(rows, self._shingles.group[places], self._shingles.row[places])
        return sorted(found + self._short(grams, at, over & ~long, own, same))

    def _short(self, grams: Grams, at: Ints, over: Mask, own: int, same: bool) -> Found:
        """Short texts that are near (Jaccard) to one single train row."""
        mine = np.flatnonzero(over[grams.row])
        if not len(mine):
            return []
        index, row = self._shingles, grams.row[mine]
        left, right = index.span(grams.hashes[mine])
        rarity = np.where(at[mine] >= 0, right - left, np.iinfo(np.int64).max)
        order = np.lexsort((rarity, row))
        rows, first, sizes = np.unique(row[order], return_index=True, return_counts=True)
        start = at[mine[order[first]]]
        forward = np.where(start == left[order[first]], 1, -1) if not same else 1
        starts = np.searchsorted(row, rows, "left")
        found: Found = []
        waiting = np.ones(len(rows), bool)
        for step in range(TRIED):
            place = np.clip(start + step * forward, 0, len(index.hashes) - 1)
            fits = (index.hashes[place] == index.hashes[start]) & (
                (index.group[place] == own) == same
            )
            pick = np.flatnonzero(waiting & fits)
            if not len(pick):
                continue
            near = self._jaccard(grams, mine, starts[pick], sizes[pick], place[pick])
            good = pick[near >= self.overlap]
            waiting[good] = False
            found += _found(rows[good], index.group[place[good]], index.row[place[good]])
        return found

    def _jaccard(
        self, grams: Grams, mine: Ints, starts: Ints, sizes: Ints, place: Ints
    ) -> npt.NDArray[np.float64]:
        """Shared over all shingles, of judged texts with one train row each."""
        pair = np.repeat(np.arange(len(place)), sizes)
        within = np.arange(len(pair)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        hashes = grams.hashes[mine[starts[pair] + within]]
        there = _place(self._shingles.group[place], self._shingles.row[place])
        wanted = _pair(hashes, there[pair])
        spot = np.minimum(np.searchsorted(self._members, wanted), len(self._members) - 1)
        shared = np.bincount(pair, self._members[spot] == wanted, len(place))
        other = self._sizes[np.searchsorted(self._places, there)]
        return np.asarray(shared / (sizes + other - shared))


class _Sorted:
    """Hashes in order; equal ones by group, then row."""

    def __init__(self, parts: Sequence[tuple[Hashes, Ints, Ints]]) -> None:
        hashes = np.concatenate([np.zeros(0, np.uint64), *(p[0] for p in parts)])
        group = np.concatenate([np.zeros(0, np.int64), *(p[1] for p in parts)])
        row = np.concatenate([np.zeros(0, np.int64), *(p[2] for p in parts)])
        order = np.lexsort((row, group, hashes))
        self.hashes, self.group, self.row = hashes[order], group[order], row[order]

    def span(self, wanted: Hashes) -> tuple[Ints, Ints]:
        """First and one-past-last place of each wanted hash."""
        left = np.searchsorted(self.hashes, wanted, "left")
        return left, np.searchsorted(self.hashes, wanted, "right")

    def find(self, wanted: Hashes, own: int, same: bool) -> Ints:
        """A place of each wanted hash in group `own` (same) or in another; -1 for none."""
        result = np.full(len(wanted), -1, np.int64)
        left, right = self.span(wanted)
        present = np.flatnonzero(right > left)
        left, right = left[present], right[present]
        if not len(present):
            return result
        if same:
            place = _first_at_least(self.group, left, right, own)
        else:  # equal hashes are ordered by group: another group comes first or last
            place = np.where(self.group[left] != own, left, right - 1)
        inside = np.minimum(place, len(self.group) - 1)
        good = (place < right) & ((self.group[inside] == own) == same)
        result[present[good]] = place[good]
        return result


def _first_at_least(group: Ints, left: Ints, right: Ints, own: int) -> Ints:
    """Binary search in many runs at once: first place in [left, right) with group >= own."""
    low, high = left.copy(), right.copy()
    while (open_ := low < high).any():
        middle = (low + high) // 2
        below = open_ & (group[np.minimum(middle, len(group) - 1)] < own)
        low = np.where(below, middle + 1, low)
        high = np.where(open_ & ~below, middle, high)
    return low


def _found(rows: Ints, group: Ints, row: Ints) -> Found:
    return list(zip(rows.tolist(), group.tolist(), row.tolist(), strict=True))


def _place(group: Ints, row: Ints) -> Hashes:
    """One number for (group, row)."""
    return (group.astype(np.uint64) << np.uint64(40)) | row.astype(np.uint64)


def _pair(hashes: Hashes, place: Hashes) -> Hashes:
    """One number for (shingle, place)."""
    return mix(hashes ^ mix(place, 4), 5)
