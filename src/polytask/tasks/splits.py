"""Which rows train, which choose and which judge.

Every split is a function of content and seed, never of history: the same rows in another order
give the same parts, and rows with equal inputs are never parted, so a random split cannot leak
exact duplicates. Streams are split by position, in blocks, so seeking stays immediate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from polytask.data.rows import Row, StreamSource
from polytask.rng import derive
from polytask.tasks.hashing import Hashes, mix
from polytask.tasks.schemas import is_missing

TRAIN, VALID, TEST = 0, 1, 2
SPLITS = ("train", "valid", "test")
ALIASES = {
    "train": "train", "training": "train", "fit": "train",
    "valid": "valid", "validation": "valid", "val": "valid", "dev": "valid",
    "development": "valid", "eval": "valid",
    "test": "test", "testing": "test",
}  # fmt: skip

Parts = npt.NDArray[np.int8]


def split_random(
    keys: Hashes,
    valid: float,
    test: float,
    seed: int,
    strata: npt.NDArray[np.int64] | None = None,
) -> Parts:
    """(rows,) 0 train, 1 valid, 2 test. Rows with one key stay together.

    Within each stratum (class) the shares are met to within one unit, over all strata too, and
    every stratum keeps at least one unit for training. Sizes are shares of the distinct keys.
    """
    units, inverse = np.unique(keys, return_inverse=True)
    if strata is None:
        stratum = np.zeros(len(units), np.int64)
    else:  # the smallest stratum of a unit's rows: does not depend on their order
        stratum = np.full(len(units), np.iinfo(np.int64).max)
        np.minimum.at(stratum, inverse, strata)
    order = np.lexsort((mix(units, derive(seed, "split")), stratum))
    ranked = stratum[order]
    heads = np.r_[True, ranked[1:] != ranked[:-1]] if len(ranked) else np.zeros(0, bool)
    free = order[~heads]
    part = np.zeros(len(units), np.int8)
    most = len(free) - (1 if valid > 0 and len(free) > 1 else 0)
    taken = _spread(len(free), round_at_least_one(len(units) * test, test, most))
    part[free[taken]] = TEST
    rest = free[~taken]
    taken = _spread(len(rest), round_at_least_one(len(units) * valid, valid, len(rest)))
    part[rest[taken]] = VALID
    return part[inverse]


def round_at_least_one(size: float, share: float, most: int) -> int:
    """A whole number of rows for a share; a share above zero gets one where there is one."""
    return min(max(round(size), 1 if share > 0 else 0), most)


def _spread(length: int, count: int) -> npt.NDArray[np.bool_]:
    """`count` of `length` places, as evenly as possible."""
    steps = (np.arange(length + 1, dtype=np.int64) * count + length // 2) // max(length, 1)
    return np.diff(steps) > 0


def split_time(times: npt.NDArray[np.float64], valid: float, test: float) -> Parts:
    """(rows,) the latest rows are test, those before valid; equal times are never parted."""
    order = np.sort(times)
    size = len(times)
    tests = round_at_least_one(size * test, test, size)
    valids = round_at_least_one(size * valid, valid, size - tests)
    part = np.zeros(size, np.int8)
    if valids and size:
        part[times >= order[size - tests - valids]] = VALID
    if tests and size:
        part[times >= order[size - tests]] = TEST
    return part


def time_of(value: Any) -> float:
    """A moment as a number: numbers as they are, dates and ISO text as seconds since 1970."""
    if is_missing(value):
        raise ValueError("the time is missing")
    if isinstance(value, int | float | np.number) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, np.datetime64):
        return float(value.astype("datetime64[us]").astype(np.int64)) / 1e6
    moment: Any = value
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
        try:
            moment = datetime.fromisoformat(value.strip())
        except ValueError:
            raise ValueError(f"time {value!r} is neither a number nor an ISO date") from None
    if hasattr(moment, "timestamp"):
        if moment.tzinfo is None:  # the clock of the machine must not matter
            return float((moment - datetime(1970, 1, 1)).total_seconds())
        return float(moment.timestamp())
    if hasattr(moment, "toordinal"):
        return float((moment.toordinal() - 719163) * 86400)
    raise ValueError(f"time {value!r} is neither a number nor a date")


def given_part(value: Any) -> int:
    """The part that a cell of a split column names."""
    name = ALIASES.get(str(value).strip().lower())
    if name is None:
        raise ValueError(f"split {value!r} is none of train, valid, test")
    return SPLITS.index(name)


def group_of(value: Any) -> Any:
    """The group that a cell names."""
    if is_missing(value):
        raise ValueError("the group to split by is missing")
    return value


READERS: dict[str, Callable[[Any], Any]] = {
    "given": given_part,
    "time": time_of,
    "group": group_of,
    "random": lambda value: value,
}
"""How each kind of split reads its column; `ValueError` for a cell that it cannot use."""

BLOCK = 1000


@dataclass(frozen=True)
class StreamPart:
    """The rows of a stream that belong to one part, as a stream of their own.

    In each block of 1000 positions exactly round(1000 * share) are valid and test, chosen by a
    hash of (seed, position). So position p of a part is found at once, without reading what is
    before it.
    """

    source: StreamSource
    part: int
    valid: float
    test: float
    seed: int

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def columns(self) -> tuple[str, ...]:
        return self.source.columns

    @cached_property
    def per_block(self) -> int:
        """How many of a block's positions are in this part."""
        tests, valids = round(BLOCK * self.test), round(BLOCK * self.valid)
        return (BLOCK - tests - valids, valids, tests)[self.part]

    def positions(self, block: int) -> npt.NDArray[np.int64]:
        """Positions in the source of this part's rows of a block, in order."""
        here = np.arange(block * BLOCK, (block + 1) * BLOCK, dtype=np.int64)
        order = here[np.argsort(mix(here.astype(np.uint64), derive(self.seed, "stream")))]
        tests, valids = round(BLOCK * self.test), round(BLOCK * self.valid)
        edges = {TEST: (0, tests), VALID: (tests, tests + valids), TRAIN: (tests + valids, BLOCK)}
        start, stop = edges[self.part]
        return np.sort(order[start:stop])

    def place(self, index: int) -> int:
        """Position in the source of the part's row `index`."""
        block, offset = divmod(index, self.per_block)
        return int(self.positions(block)[offset])

    def read_from(self, position: int) -> Iterator[Row]:
        if self.per_block == 0:
            return
        at = self.place(position)
        block, wanted = at // BLOCK, iter(self.positions(at // BLOCK).tolist())
        target = next(p for p in wanted if p >= at)
        for here, row in enumerate(self.source.read_from(at), start=at):
            if here < target:
                continue
            yield row
            following = next(wanted, None)
            if following is None:
                block += 1
                wanted = iter(self.positions(block).tolist())
                following = next(wanted)
            target = following

    def where(self, index: int) -> str:
        return self.source.where(self.place(index))


def parts_of(part: Parts) -> dict[str, npt.NDArray[np.int64]]:
    """Split name -> row indices, for the parts that have rows."""
    found = {name: np.flatnonzero(part == k) for k, name in enumerate(SPLITS)}
    return {name: index for name, index in found.items() if len(index)}


def group_keys(values: Sequence[Any]) -> Hashes:
    """(rows,) a number per group value."""
    from polytask.tasks.hashing import content_hashes

    return content_hashes([{"group": value} for value in values], ("group",))
