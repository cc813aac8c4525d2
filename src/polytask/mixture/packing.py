"""Several short texts in one sequence: less padding, and nothing lost on the way.

A packed sequence ("bin") holds segments: whole rows, or pieces of rows that are longer than the
width. Attention must stay inside a segment (`segment`), positions restart in each (`position`), and
every token carries the weight of its task (`weight`), so packing does not change what a mixture
weighs. Rows longer than the width are split or refused, never cut; every token read is in exactly
one bin, and `unpack` gives back the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from polytask.errors import ConfigError, DataError
from polytask.mixture.quota import Ints
from polytask.mixture.schedule import ramp

Long = Literal["split", "refuse"]
NO_SEGMENT = -1  # of padding
IGNORED = -100  # label of padding, as everywhere


@dataclass(frozen=True)
class Tokens:
    """One row to pack. `weight` is for each token, or one for all; `labels` align with `ids`."""

    ids: npt.NDArray[np.integer[Any]]  # (length,)
    task: int = 0
    weight: float | npt.NDArray[np.floating[Any]] = 1.0
    labels: npt.NDArray[np.integer[Any]] | None = None


@dataclass(frozen=True)
class PackPlan:
    """Which piece of which row goes where. Arrays are (pieces,), by bin and place in the bin."""

    width: int
    bins: int
    row: Ints  # index into the rows that were packed
    start: Ints  # first token of the piece in its row
    length: Ints
    bin: Ints
    segment: Ints  # number of the piece in its bin
    offset: Ints  # first place of the piece in its bin

    @property
    def tokens(self) -> int:
        return int(self.length.sum())

    @property
    def efficiency(self) -> float:
        """Share of places that hold a token."""
        return self.tokens / (self.bins * self.width) if self.bins else 1.0

    def fill(
        self, values: Sequence[npt.ArrayLike], pad: float, dtype: npt.DTypeLike
    ) -> npt.NDArray[Any]:
        """Lay out arrays that align with the rows' tokens: (bins, width), `pad` elsewhere."""
        sizes = np.array([np.shape(v)[0] for v in values], dtype=np.int64)
        flat = np.concatenate([np.asarray(v) for v in values]) if len(values) else np.zeros(0)
        begin = np.cumsum(sizes) - sizes
        piece, step = ramp(self.length)
        out = np.full(self.bins * self.width, pad, dtype=dtype)
        out[self._places(piece, step)] = flat[(begin[self.row] + self.start)[piece] + step]
        return out.reshape(self.bins, self.width)

    def segments(self) -> npt.NDArray[np.int32]:
        """(bins, width): number of the segment each place belongs to, `NO_SEGMENT` for padding."""
        piece, step = ramp(self.length)
        out = np.full(self.bins * self.width, NO_SEGMENT, dtype=np.int32)
        out[self._places(piece, step)] = self.segment[piece]
        return out.reshape(self.bins, self.width)

    def positions(self) -> npt.NDArray[np.int32]:
        """(bins, width): position within the segment, 0 for padding."""
        piece, step = ramp(self.length)
        out = np.zeros(self.bins * self.width, dtype=np.int32)
        out[self._places(piece, step)] = step
        return out.reshape(self.bins, self.width)

    def _places(self, piece: Ints, step: Ints) -> Ints:
        return np.asarray((self.bin * self.width + self.offset)[piece] + step)


def pack(lengths: npt.ArrayLike, width: int, long: Long = "split") -> PackPlan:
    """Pack rows of these lengths by best fit decreasing (at most 11/9 of the fewest bins).

    Deterministic. Bins come in the order of their earliest row, and so do the rows in a bin, so
    that packing keeps the order of the mixture as far as it can.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    check_lengths(sizes, width, long, lambda row: f"row {row}")
    row, number = ramp(-(-sizes // width))
    start = number * width
    length = np.minimum(sizes[row] - start, width)
    return lay_out(row, start, length, best_fit_decreasing(length, width), width)


def best_fit_decreasing(lengths: Ints, width: int) -> Ints:
    """The bin of each piece: longest first, each into the fullest bin that still takes it.

    Bins of equal room are one stack, and the stacks that hold any are the bits of one integer.
    """
    out = np.zeros(len(lengths), dtype=np.int64)
    stacks: list[list[int]] = [[] for _ in range(width + 1)]
    some, count = 0, 0
    order = np.argsort(-lengths, kind="stable")
    for piece, length in zip(order.tolist(), lengths[order].tolist()):
        fitting = some >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            place = stacks[room].pop()
            if not stacks[room]:
                some ^= 1 << room
        else:
            room, place, count = width, count, count + 1
        out[piece] = place
        left = room - length
        stacks[left].append(place)
        some |= 1 << left
    return out


def pack_two(first: Ints, second: Ints, first_width: int, second_width: int) -> Ints:
    """(rows,) the bin of each row where a row takes room of two kinds (inputs and targets).

    First fit decreasing by the larger share of a width. Bins are numbered by their earliest row.
    Rows have to fit a bin of their own.
    """
    first, second = np.asarray(first, np.int64), np.asarray(second, np.int64)
    share = np.maximum(first / first_width, second / second_width)
    if (share > 1).any():
        row = int(np.argmax(share > 1))
        raise DataError(
            f"row {row} takes {first[row]} and {second[row]} places, more than a bin's "
            f"{first_width} and {second_width}"
        )
    room = np.empty((2, len(first)), np.int64)
    out, bins = np.zeros(len(first), np.int64), 0
    for row in np.argsort(-share, kind="stable").tolist():
        fits = (room[0, :bins] >= first[row]) & (room[1, :bins] >= second[row])
        place = int(fits.argmax()) if fits.any() else bins
        if place == bins:
            room[:, bins] = first_width, second_width
            bins += 1
        room[0, place] -= first[row]
        room[1, place] -= second[row]
        out[row] = place
    earliest = np.full(bins, len(out))
    np.minimum.at(earliest, out, np.arange(len(out)))
    rank = np.empty(bins, np.int64)
    rank[np.argsort(earliest, kind="stable")] = np.arange(bins)
    return np.asarray(rank[out])


def lay_out(row: Ints, start: Ints, length: Ints, bin_: Ints, width: int) -> PackPlan:
    """The plan that puts pieces into these bins; renumbers the bins by their earliest row."""
    bins = int(bin_.max()) + 1 if len(bin_) else 0
    earliest = np.full(bins, np.iinfo(np.int64).max)
    np.minimum.at(earliest, bin_, np.arange(len(row)))
    rank = np.empty(bins, dtype=np.int64)
    rank[np.argsort(earliest, kind="stable")] = np.arange(bins)
    number = rank[bin_]
    order = np.argsort(number, kind="stable")
    return in_order(row[order], start[order], length[order], number[order], bins, width)


def in_order(row: Ints, start: Ints, length: Ints, bin_: Ints, bins: int, width: int) -> PackPlan:
    """The plan of pieces that are sorted by bin already."""
    first = np.searchsorted(bin_, np.arange(bins))
    before = np.cumsum(length) - length
    offset = before - before[first][bin_]
    segment = np.arange(len(row)) - first[bin_]
    return PackPlan(width, bins, row, start, length, bin_, segment, offset)


def check_lengths(lengths: Ints, width: int, long: Long, name: Callable[[int], str]) -> None:
    """Refuse rows without tokens, and rows beyond the width where those are not to be split."""
    if width < 1:
        raise ConfigError(f"cannot pack into bins of width {width}")
    if (lengths < 1).any():
        row = int(np.argmax(lengths < 1))
        raise DataError(f"{name(row)} has no tokens to pack")
    if long == "refuse" and (lengths > width).any():
        row = int(np.argmax(lengths > width))
        raise DataError(
            f"{name(row)} has {lengths[row]} tokens, more than the packing width {width}. Raise "
            "the width, or allow long rows to be split"
        )


@dataclass(frozen=True)
class Packed:
    """Bins ready for a model, (bins, width) each, and where every piece came from."""

    ids: npt.NDArray[np.int32]
    segment: npt.NDArray[np.int32]  # `NO_SEGMENT` is padding
    position: npt.NDArray[np.int32]
    weight: npt.NDArray[np.float32]  # 0 is padding
    labels: npt.NDArray[np.int32] | None
    plan: PackPlan  # its `row` are global row numbers
    task: Ints  # (pieces,)

    @property
    def efficiency(self) -> float:
        return self.plan.efficiency


def unpack(batches: Iterable[Packed]) -> dict[int, npt.NDArray[np.int32]]:
    """The rows' tokens by row number, from bins in any order; a missing piece is an error."""
    pieces: dict[int, list[tuple[int, npt.NDArray[np.int32]]]] = {}
    for packed in batches:
        plan = packed.plan
        for at in range(len(plan.row)):
            begin = int(plan.offset[at])
            tokens = packed.ids[plan.bin[at], begin : begin + int(plan.length[at])]
            pieces.setdefault(int(plan.row[at]), []).append((int(plan.start[at]), tokens))
    out = {}
    for row, parts in sorted(pieces.items()):
        parts.sort(key=lambda part: part[0])
        ends = np.cumsum([len(tokens) for _, tokens in parts])
        if [start for start, _ in parts] != [0, *ends[:-1].tolist()]:
            raise ValueError(f"row {row} is not whole in these bins")
        out[row] = np.concatenate([tokens for _, tokens in parts])
    return out
