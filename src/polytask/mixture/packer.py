"""Packing rows as they come, with a state of a few integers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from polytask.errors import ConfigError, DataError
from polytask.mixture.packing import (
    IGNORED,
    Long,
    Packed,
    PackPlan,
    Tokens,
    check_lengths,
    in_order,
    pack,
)
from polytask.mixture.quota import Ints

Piece = tuple[int, int, int]  # row, first token, tokens


@dataclass
class Packer:
    """Packs a stream of rows, `next(n)` bins at a time.

    Args:
        read: (first row, number of rows) -> rows; fewer where the source ends. After a restart rows
            are asked for again, so the same numbers have to give the same rows.
        width: tokens per bin.
        strategy: 'decreasing' packs `buffer` rows at a time, best fit decreasing; the state is the
            buffer's first row and how many of its bins were handed out. 'streaming' puts each row
            into the fullest of at most `open_bins` bins and hands out the fullest when it needs a
            new one; rows wait less, and the state names the pieces that wait.
        long: 'split' rows longer than the width into pieces, or 'refuse' them.
        weigh: what a row's weight is for: each of its 'token's, or the 'row' as a whole, so that
            long rows do not drown short ones.
        name: how to call a row in an error, for instance by its file and line.

    Attributes: `bins` and `tokens` handed out so far.
    """

    read: Callable[[int, int], Sequence[Tokens]]
    width: int
    strategy: Literal["decreasing", "streaming"] = "decreasing"
    buffer: int = 512
    open_bins: int = 32
    long: Long = "split"
    weigh: Literal["token", "row"] = "token"
    pad_id: int = 0
    name: Callable[[int], str] = "row {}".format
    bins: int = field(default=0, init=False)
    tokens: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if min(self.width, self.buffer, self.open_bins) < 1:
            raise ConfigError("packing needs a width, a buffer and open_bins of at least 1")
        if self.strategy not in ("decreasing", "streaming"):
            raise ConfigError(f"packing strategy '{self.strategy}': decreasing or streaming")
        self._row = 0  # first row of the buffer; next row to place
        self._taken = 0  # bins handed out of the buffer; pieces placed of the next row
        self._waiting: list[list[Piece]] = []
        self._rows: dict[int, Tokens] = {}
        self._plan: PackPlan | None = None
        self._held = 0  # rows in the buffer

    @property
    def efficiency(self) -> float:
        """Share of the places handed out that hold a token."""
        return self.tokens / (self.bins * self.width) if self.bins else 1.0

    def next(self, n: int) -> Packed:
        """The next `n` bins; fewer at the end of the source, where the last ones are emptied."""
        take = self._from_buffer if self.strategy == "decreasing" else self._from_stream
        packed = self._build(take(n))
        self.bins += packed.plan.bins
        self.tokens += packed.plan.tokens
        waiting = {row for pieces in self._waiting for row, _, _ in pieces}
        self._rows = {r: t for r, t in self._rows.items() if r >= self._row or r in waiting}
        return packed

    def state(self) -> dict[str, Any]:
        """Plain JSON: where reading goes on, and (streaming) the pieces that wait."""
        return {
            "row": self._row,
            "taken": self._taken,
            "waiting": [[list(piece) for piece in pieces] for pieces in self._waiting],
            "bins": self.bins,
            "tokens": self.tokens,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned; rows are read again when they are needed."""
        self._row, self._taken = int(state["row"]), int(state["taken"])
        self._waiting = [[(int(r), int(s), int(n)) for r, s, n in b] for b in state["waiting"]]
        self.bins, self.tokens = int(state["bins"]), int(state["tokens"])
        self._rows, self._plan = {}, None

    def _from_buffer(self, n: int) -> list[list[Piece]]:
        out: list[list[Piece]] = []
        while len(out) < n:
            if self._plan is None:
                rows = self._fetch(self._row)
                if not rows:
                    break
                self._plan, self._held = pack([len(t.ids) for t in rows], self.width), len(rows)
            plan = self._plan
            upto = min(plan.bins, self._taken + n - len(out))
            for number in range(self._taken, upto):
                first, last = np.searchsorted(plan.bin, [number, number + 1])
                rows_ = (plan.row[first:last] + self._row).tolist()
                starts, lengths = plan.start[first:last].tolist(), plan.length[first:last].tolist()
                out.append(list(zip(rows_, starts, lengths)))
            self._taken = upto
            if upto == plan.bins:
                self._row, self._taken, self._plan = self._row + self._held, 0, None
        return out

    def _from_stream(self, n: int) -> list[list[Piece]]:
        out: list[list[Piece]] = []
        full = [sum(length for _, _, length in pieces) for pieces in self._waiting]
        while len(out) < n:
            if self._row not in self._rows and not self._fetch(self._row):
                if not self._waiting:
                    break
                out.append(self._waiting.pop(0))
                full.pop(0)
                continue
            total = len(self._rows[self._row].ids)
            start = self._taken * self.width
            length = min(self.width, total - start)
            fits = [at for at, tokens in enumerate(full) if tokens + length <= self.width]
            if fits:
                at = max(fits, key=full.__getitem__)
            else:
                if len(full) == self.open_bins:
                    fullest = max(range(len(full)), key=full.__getitem__)
                    out.append(self._waiting.pop(fullest))
                    full.pop(fullest)
                at = len(full)
                self._waiting.append([])
                full.append(0)
            self._waiting[at].append((self._row, start, length))
            full[at] += length
            self._taken += 1
            if start + length == total:
                self._row, self._taken = self._row + 1, 0
        return out

    def _fetch(self, first: int, count: int | None = None) -> Sequence[Tokens]:
        """Read rows, check them and keep them."""
        rows = self.read(first, count or self.buffer)
        lengths = np.array([len(t.ids) for t in rows], dtype=np.int64)
        check_lengths(lengths, self.width, self.long, lambda at: self.name(first + at))
        self._rows.update(zip(range(first, first + len(rows)), rows))
        return rows

    def _build(self, bins: list[list[Piece]]) -> Packed:
        flat = [(at, *piece) for at, pieces in enumerate(bins) for piece in pieces]
        table = np.array(flat, dtype=np.int64).reshape(-1, 4)
        number, row, start, length = table.T
        plan = in_order(row, start, length, number, len(bins), self.width)
        used, local = np.unique(row, return_inverse=True)
        for missing in [r for r in used.tolist() if r not in self._rows]:  # after a restart
            self._fetch(missing, 1)
        tokens = [self._rows[r] for r in used.tolist()]
        near = in_order(local, start, length, number, len(bins), self.width)
        return Packed(
            ids=near.fill([t.ids for t in tokens], self.pad_id, np.int32),
            segment=near.segments(),
            position=near.positions(),
            weight=near.fill([self._weights(t) for t in tokens], 0.0, np.float32),
            labels=self._labels(near, used, tokens),
            plan=plan,
            task=np.array([t.task for t in tokens], dtype=np.int64)[local],
        )

    def _weights(self, tokens: Tokens) -> npt.NDArray[np.float64]:
        weight = np.broadcast_to(np.asarray(tokens.weight, np.float64), (len(tokens.ids),))
        return weight / len(tokens.ids) if self.weigh == "row" else weight

    def _labels(
        self, plan: PackPlan, rows: Ints, tokens: Sequence[Tokens]
    ) -> npt.NDArray[np.int32] | None:
        labels = [t.labels for t in tokens if t.labels is not None]
        if not labels:
            return None
        for row, t in zip(rows.tolist(), tokens):
            if t.labels is None or len(t.labels) != len(t.ids):
                raise DataError(
                    f"{self.name(row)}: labels do not align with its {len(t.ids)} tokens; in one "
                    "stream either all rows have labels or none"
                )
        return plan.fill(labels, IGNORED, np.int32)
