"""From weights to an order over all rows: legs of fixed shares, one after the other.

Weights that are ratios of small numbers repeat one leg for ever; other weights have one endless
leg. Groups that stop cut the order into legs: within a leg the shares are fixed, and in the row in
which a group's quota completes its last epoch the others share what it leaves. An adaptive policy
adds a leg per round, in whole rows, so that each round starts even.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from polytask.mixture.quota import (
    FINE,
    Bools,
    Floats,
    Ints,
    Parts,
    Shares,
    coarse_shares,
    fine_shares,
    whole_numbers,
)
from polytask.mixture.schedule import Boundary, Leg, Stretch

Block = tuple[int, Ints, Ints]  # first slot, groups, ordinals


class Plan(Protocol):
    """An order of groups over slots (rows, or steps where a step belongs to one group)."""

    @property
    def total(self) -> int | None:
        """Slots until every group has stopped; None without end."""

    def block(self, slot: int) -> Block:
        """The block that holds `slot`: its first slot, and the group and ordinal of every slot."""

    def due(self, slot: int) -> Floats:
        """What each group is due after `slot` slots: counts stay within one of it."""


def block_length(groups: int) -> int:
    """Rows per block: grows with the groups, so that work per row does not."""
    return max(4096, 1 << (4 * groups - 1).bit_length())


def even(groups: int, counts: Ints | None = None) -> Boundary:
    """A boundary at which nobody is due a part of a row."""
    whole = np.zeros(groups, dtype=np.int64) if counts is None else counts
    return Boundary(whole, np.zeros(groups, dtype=np.uint64), np.zeros(groups, dtype=np.bool_))


def make_plan(weights: Floats, limits: Ints | None = None) -> Plan:
    """The plan for fixed weights. `limits` (groups,): rows after which a group stops; -1 never."""
    if limits is not None and (limits >= 0).any():
        return StoppingPlan(weights, limits)
    rows = whole_numbers(weights)
    return EndlessPlan(weights) if rows is None else RepeatingPlan(rows)


class EndlessPlan:
    """One leg without end."""

    total: int | None = None

    def __init__(self, weights: Floats) -> None:
        groups = len(weights)
        self.shares = fine_shares(weights)
        self._leg = Leg(self.shares, even(groups), None, block_length(groups))

    def block(self, slot: int) -> Block:
        number = slot // self._leg.block
        return (number * self._leg.block, *self._leg.fill(number))

    def due(self, slot: int) -> Floats:
        return _rows(self._leg, slot)


class RepeatingPlan:
    """The same leg over and over: `rows` (groups,) of each group in every period."""

    total: int | None = None

    def __init__(self, rows: Ints) -> None:
        block = block_length(len(rows))
        self._rows = rows
        self.shares = coarse_shares(rows)
        self._leg = Leg(self.shares, even(len(rows)), int(rows.sum()), block)
        self._copies = max(1, block // int(rows.sum()))  # short periods share a block

    def block(self, slot: int) -> Block:
        period = int(self._rows.sum())
        turn, within = divmod(slot, period * self._copies)
        group, ordinal = self._leg.fill(within % period // self._leg.block)
        if self._copies > 1:
            copy = np.repeat(np.arange(self._copies), period)
            group, ordinal = np.tile(group, self._copies), np.tile(ordinal, self._copies)
            ordinal = ordinal + copy * self._rows[group]
        first = turn * period * self._copies
        ordinal = ordinal + turn * self._copies * self._rows[group]
        return first + within // self._leg.block * self._leg.block, group, ordinal

    def due(self, slot: int) -> Floats:
        turn, within = divmod(slot, int(self._rows.sum()))
        return turn * self._rows + _rows(self._leg, within)


class StoppingPlan:
    """Legs between the rows at which groups stop; found as far as they are asked for."""

    def __init__(self, weights: Floats, limits: Ints) -> None:
        self.total = None if ((limits < 0) & (weights > 0)).any() else int(limits.sum())
        self._stretches = _Lazy(_stretches(weights, limits))
        self._starts = [0]
        self._legs: list[Leg] = []
        self._next = even(len(weights))

    def _leg_at(self, slot: int) -> tuple[int, Leg]:
        while self._starts[-1] <= slot and (not self._legs or self._legs[-1].length is not None):
            self._add()
        at = bisect_right(self._starts, slot) - 1
        at = min(at, len(self._legs) - 1)
        return self._starts[at], self._legs[at]

    def _add(self) -> None:
        number = len(self._legs)
        stretch = self._stretches[number]
        groups = len(self._next.whole)
        leg = Leg(stretch.shares, self._next, stretch.length, block_length(groups))
        if stretch.length is not None:
            ahead = self._stretches.after(number)
            self._next = leg.end = leg.settle(stretch.length, 0, leg.start, None, None, ahead)
            self._starts.append(self._starts[-1] + stretch.length)
        self._legs.append(leg)

    def block(self, slot: int) -> Block:
        start, leg = self._leg_at(slot)
        number = (slot - start) // leg.block
        return (start + number * leg.block, *leg.fill(number))

    def due(self, slot: int) -> Floats:
        start, leg = self._leg_at(min(slot, self.total - 1) if self.total else slot)
        return _rows(leg, slot - start)


@dataclass
class RoundsPlan:
    """A leg per round, each of whole rows per group; rounds are added as the policy decides."""

    groups: int
    length: int
    total: int | None = None
    first: int = 0  # number of the earliest round that is kept
    counts: list[Ints] = field(default_factory=list)  # at the start of each round kept, and after
    _latest: tuple[int, Leg] | None = None

    def __post_init__(self) -> None:
        self.counts = self.counts or [np.zeros(self.groups, dtype=np.int64)]

    @property
    def rounds(self) -> int:
        """How many rounds are decided."""
        return self.first + len(self.counts) - 1

    def add(self, rows: Ints, keep: int) -> None:
        """Decide the next round: `rows` (groups,) of each group. Keeps the latest `keep` rounds."""
        self.counts.append(self.counts[-1] + rows)
        spare = max(0, len(self.counts) - 1 - keep)
        del self.counts[:spare]
        self.first += spare

    def _leg(self, number: int) -> Leg:
        if self._latest is not None and self._latest[0] == number:
            return self._latest[1]
        at = number - self.first
        rows = self.counts[at + 1] - self.counts[at]
        start = even(self.groups, self.counts[at])
        leg = Leg(coarse_shares(rows), start, int(rows.sum()), block_length(self.groups))
        self._latest = (number, leg)
        return leg

    def block(self, slot: int) -> Block:
        number, within = divmod(slot, self.length)
        leg = self._leg(number)
        first = within // leg.block
        return (number * self.length + first * leg.block, *leg.fill(first))

    def due(self, slot: int) -> Floats:
        number = min(slot // self.length, self.rounds - 1)
        return _rows(self._leg(number), slot - number * self.length)


def spill(wish: Floats, room: Ints) -> Floats:
    """Shares of a round with nobody above its room: what some cannot take goes to the others,
    as their wishes are."""
    out = np.minimum(wish, room)
    while True:
        spare = wish.sum() - out.sum()
        open_ = (out < room) & (wish > 0)
        if spare <= 1e-9 * max(1.0, float(wish.sum())) or not open_.any():
            return out
        more = np.where(open_, wish, 0.0)
        out = np.minimum(out + spare * more / more.sum(), room)


def whole_rows(wish: Floats, room: Ints, total: int) -> Ints:
    """Whole rows closest to `wish` with sum `total` (or all there is room for), none above `room`:
    the largest remainders are rounded up."""
    rows = np.clip(np.floor(wish).astype(np.int64), 0, room)
    while (missing := min(total, int(room.sum())) - int(rows.sum())) != 0:
        able = np.flatnonzero(rows < room if missing > 0 else rows > 0)
        order = able[np.argsort((rows - wish)[able] * np.sign(missing), kind="stable")]
        rows[order[: abs(missing)]] += int(np.sign(missing))
    return rows


def _rows(leg: Leg, time: int) -> Floats:
    whole, part = leg.due(time)
    return whole + part / float(leg.shares.modulus)


class _Lazy:
    """The stretches of a plan, worked out as far as somebody looks."""

    def __init__(self, source: Iterator[Stretch]) -> None:
        self._source = source
        self._seen: list[Stretch] = []

    def __getitem__(self, number: int) -> Stretch:
        while len(self._seen) <= number:
            self._seen.append(next(self._source))
        return self._seen[number]

    def after(self, number: int) -> Iterator[Stretch]:
        """The stretches that follow stretch `number`."""
        while True:
            number += 1
            try:
                yield self[number]
            except StopIteration:
                return


def _stretches(weights: Floats, limits: Ints) -> Iterator[Stretch]:
    """Shares between stops. Whole rows first; then one row in which the groups that reach their
    limit take what they are still due and the others share the rest."""
    whole = np.zeros(len(weights), dtype=np.int64)
    part = np.zeros(len(weights), dtype=np.uint64)
    alive = weights > 0
    while alive.any():
        shares = fine_shares(np.where(alive, weights, 0.0))
        stops = alive & (limits >= 0)
        if not stops.any():
            yield Stretch(shares, None, alive)
            return
        room = _room(whole, part, limits, stops)
        rate = shares.rate.tolist()
        rows = min(room[i] // rate[i] for i in room if rate[i])
        if rows:
            yield Stretch(shares, rows, alive)
            more, part = shares.due(rows, part)
            whole = whole + more
            room = {i: left - rows * rate[i] for i, left in room.items()}
        if all(room.values()):
            last = _last_row(rate, room, alive)
            yield Stretch(last, 1, alive)
            more, part = last.due(1, part)
            whole = whole + more
        alive = alive & ~((limits >= 0) & (whole == limits))


def _room(whole: Ints, part: Parts, limits: Ints, stops: Bools) -> dict[int, int]:
    """What each group may still get, in parts of the fine modulus."""
    left = (limits - whole).tolist()
    parts = part.tolist()
    return {int(i): left[i] * FINE - parts[i] for i in np.flatnonzero(stops)}


def _last_row(rate: list[int], room: dict[int, int], alive: Bools) -> Shares:
    """One row's shares with nobody above its room: what some cannot take, the others share."""
    got: dict[int, int] = {}
    free = {int(i) for i in np.flatnonzero(alive)}
    while True:
        spare, total = FINE - sum(got.values()), sum(rate[i] for i in free)
        full = {i for i in free if i in room and room[i] * total <= rate[i] * spare}
        if not full:
            break
        got |= {i: room[i] for i in full}
        free -= full
    got |= {i: rate[i] * spare // total for i in free}
    for i in sorted(free)[: FINE - sum(got.values())]:  # rounding left less than one part each
        got[i] += 1
    return Shares(np.array([got.get(i, 0) for i in range(len(rate))], dtype=np.uint64), FINE)
