"""Which group comes next: an order that is within one row of the shares at every prefix.

The chairman assignment problem (Tijdeman, 1980; Pfair scheduling in real-time systems, Baruah et
al., 1996): the j-th row of a group with share w has to come in slots floor((j-1)/w) + 1 to
ceil(j/w), its window. Then |count - w n| < 1 for every n. Earliest deadline first finds such an
order, but one row after the other; here any row can be reached directly:

1. Time is cut into blocks. At a boundary n the only thing to decide is, for each group that is due
   a part of a row, whether that row (it is `open`) comes before n (`done`) or after.
2. By Hall's theorem all windows between two boundaries can be met if and only if, counting back
   from the later one, no stretch of u slots is asked to hold more than u rows that must come in it,
   counting on from the earlier one likewise, and no row done at the earlier is undone at the later.
   The first condition caps how many of the youngest open rows may be done (nested sets, a matroid),
   the second asks for the most urgent; so taking open rows by deadline while the caps hold is
   optimal: if any choice works, this one does.
3. The caps follow in closed form, because what is due grows evenly: of the open rows whose window
   began at most u slots ago, ceil(due(n) of those + u * (share of all others)) may be done. A
   choice that also passes the mirrored test of urgency is *proven* feasible with O(groups) work,
   however long the block. Should none pass (none is known, but rows whose windows span whole
   blocks escape the proof that one always does), the exact caps are counted slot by slot.
4. A boundary is settled from the two nearest ones of a coarser grid (twice the block, four times,
   ...), so row n takes O(log n) choices; then one block is filled by earliest deadline first.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from polytask.errors import PolytaskError
from polytask.mixture.quota import Bools, Floats, Ints, Parts, Shares, advance, crossing

FAR = np.int64(2**62)  # a time that never comes
_NEAR = 1e-9  # sums of parts are doubles: a bound this close to a whole number is taken strictly
_EXACT_LIMIT = 1 << 22  # exact caps count at most this many slots back


def age_of(part: Parts, shares: Shares) -> Ints:
    """Slots since the window of each group's open row began; for no open row, of its last one."""
    return _slots(np.where(part > 0, part, np.uint64(shares.modulus)), shares.rate)


def deadline_of(part: Parts, shares: Shares) -> Ints:
    """Slots until the window of each group's open (or next) row ends."""
    return _slots(np.uint64(shares.modulus) - part, shares.rate)


def _slots(need: Parts, rate: Parts) -> Ints:
    some = np.maximum(rate, np.uint64(1))
    slots = need // some + (need % some > 0)
    return np.where(rate > 0, np.minimum(slots, np.uint64(FAR)), np.uint64(FAR)).astype(np.int64)


@dataclass(frozen=True)
class Stretch:
    """Rows to come under fixed shares; `alive` are the groups that get rows from here on."""

    shares: Shares
    length: int | None
    alive: Bools


def deadlines(part: Parts, ahead: Iterable[Stretch]) -> tuple[Ints, tuple[Stretch, ...]]:
    """Slots until the window of each group's open (or next) row ends, through changing shares.

    Also the stretches this had to look at.
    """
    out = np.full(len(part), FAR)
    todo = np.ones(len(part), dtype=np.bool_)
    passed = 0
    seen: list[Stretch] = []
    for stretch in ahead:
        seen.append(stretch)
        todo &= stretch.alive
        slots = deadline_of(part, stretch.shares)
        if stretch.length is None:
            out[todo] = np.minimum(slots[todo] + passed, FAR)
            break
        ends = todo & (slots <= stretch.length)
        out[ends] = slots[ends] + passed
        todo &= ~ends
        if not todo.any():
            break
        _, part = stretch.shares.due(stretch.length, part)
        passed += stretch.length
    return out, tuple(seen)


@dataclass(frozen=True)
class Boundary:
    """Where all groups stand after some rows."""

    whole: Ints  # (groups,) whole rows due
    part: Parts  # (groups,) the part of a row due beyond those
    done: Bools  # (groups,) whether the open row has come already

    @property
    def count(self) -> Ints:
        """Rows each group has had, (groups,)."""
        return self.whole + self.done


@dataclass
class Leg:
    """A stretch of rows under fixed shares, from a known boundary: settles and fills its blocks.

    `length` None is endless. `end` is the boundary that closes a finite leg; without one the leg
    must come out even (no part of a row due at its end).
    """

    shares: Shares
    start: Boundary
    length: int | None
    block: int
    end: Boundary | None = None
    exact_caps: int = 0  # how often the closed form did not suffice
    _known: OrderedDict[int, Boundary] = field(default_factory=OrderedDict)

    def due(self, time: int) -> tuple[Ints, Parts]:
        """Whole rows and part due at `time` (rows since the leg began)."""
        whole, part = self.shares.due(time, self.start.part)
        return whole + self.start.whole, part

    def boundary(self, time: int) -> Boundary:
        """The settled boundary at a multiple of the block, or at the end."""
        if time == 0:
            return self.start
        if time == self.length:
            return self.end or self._closed(time)
        if time in self._known:
            self._known.move_to_end(time)
            return self._known[time]
        number = time // self.block
        low = number & -number
        left, right = (number - low) * self.block, (number + low) * self.block
        after: Boundary | None
        if self.length is None and left == 0:  # powers of two: each from the one before
            left, after = (low // 2) * self.block, None
        elif self.length is not None and right >= self.length:
            right, after = self.length, self.boundary(self.length)
        else:
            after = self.boundary(right)
        settled = self.settle(time, left, self.boundary(left), right if after else None, after)
        self._known[time] = settled
        if len(self._known) > 192:
            self._known.popitem(last=False)
        return settled

    def _closed(self, time: int) -> Boundary:
        whole, part = self.due(time)
        if part.any():
            raise ValueError("a finite leg needs its closing boundary unless it comes out even")
        return Boundary(whole, part, np.zeros(len(part), dtype=np.bool_))

    def settle(
        self,
        time: int,
        left: int,
        before: Boundary,
        right: int | None,
        after: Boundary | None,
        ahead: Iterable[Stretch] | None = None,
    ) -> Boundary:
        """Decide which open rows are done at `time`, given boundaries before and (if known) after.

        `ahead` are the stretches that follow if the shares change at `time`.
        """
        whole, part = self.due(time)
        age = np.minimum(age_of(part, self.shares), time - left)
        following = ahead or [Stretch(self.shares, None, self.shares.rate > 0)]
        urgent, seen = deadlines(part, following)
        free = part > 0
        done = free & before.done & (whole == before.whole)  # came before the earlier boundary
        free = free & ~done
        horizon = int(FAR)
        if after is not None and right is not None:
            free &= after.done | (after.whole > whole)  # the rest comes after the later boundary
            horizon = right - time
            urgent = np.minimum(urgent, horizon)
        wanted = int(time + self.start.count.sum() - whole.sum() - done.sum())
        case = _Case(self.shares, part, age, urgent, free, done, wanted, time - left, horizon, seen)
        chosen = case.choose(case.closed_caps())
        if chosen is None or not case.urgent_served(chosen | done):
            self.exact_caps += 1
            chosen = case.choose(case.exact_caps())
        if chosen is None:
            raise PolytaskError(f"the mixture has no order within one row at row {time}")
        return Boundary(whole, part, chosen | done)

    def fill(self, number: int) -> tuple[Ints, Ints]:
        """The groups of block `number`'s rows, and each row's ordinal in its group (from 0)."""
        first = number * self.block
        last = first + self.block if self.length is None else min(first + self.block, self.length)
        before, after = self.boundary(first), self.boundary(last)
        due = after.count - before.whole  # rows numbered from `before.whole` on
        skip = before.done.astype(np.int64)
        return fill_block(self.shares, before, skip, due, last - first)


@dataclass(frozen=True)
class _Case:
    """One boundary to settle. Nested sets are prefixes of the groups sorted by age or deadline."""

    shares: Shares
    part: Parts
    age: Ints
    urgent: Ints
    free: Bools  # open rows to decide on
    done: Bools  # open rows already done
    wanted: int  # how many of the free rows have to be done
    back: int  # slots to the earlier boundary
    horizon: int  # slots to the later one
    ahead: tuple[Stretch, ...]

    def closed_caps(self) -> tuple[Ints, Ints]:
        """Ages u < back, and how many open rows of at most that age may be done."""
        order, last = _nested(self.age, self.back)
        times = self.age[order][last]
        due = np.cumsum(self.part[order] / self.shares.modulus)[last]
        caps = np.ceil(due + times * _above(self.shares.weights[order])[last] - _NEAR)
        return times, caps.astype(np.int64)

    def urgent_served(self, done: Bools) -> bool:
        """Whether enough of the most urgent open rows are done, by the closed form."""
        order, last = _nested(self.urgent, self.horizon)
        times = self.urgent[order][last]
        least = np.cumsum(self.part[order] / self.shares.modulus)[last]
        passed = 0
        for stretch in self.ahead:
            slots = np.clip(times - passed, 0, stretch.length)
            least -= slots * _above(stretch.shares.weights[order])[last]
            passed += stretch.length or 0
        return bool((np.cumsum(done[order])[last] >= np.floor(least + _NEAR)).all())

    def exact_caps(self) -> tuple[Ints, Ints]:
        """The caps counted: u minus the rows that have to come in the last u slots."""
        reach = int(min(self.back, self.age[self.free].max(initial=0) + 1, _EXACT_LIMIT))
        some = self.shares.rate > 0
        rate, modulus = self.shares.rate[some], self.shares.modulus
        part = np.where(self.part > 0, np.uint64(modulus) - self.part, np.uint64(0))[some]
        whole, _ = advance(part, rate, np.uint64(reach), modulus)  # type: ignore[arg-type]
        group, number = ramp(whole)
        began = crossing(part[group], rate[group], number + 1, modulus)
        forced = (number > 0) | (self.part[some][group] == 0)  # number 0 is the open row itself
        held = np.cumsum(np.bincount(began[forced], minlength=reach + 1))[: reach + 1]
        times = np.arange(1, reach)
        caps = times - held[1:reach]
        if reach < _EXACT_LIMIT:  # no open row to decide on is older: nothing beyond can bind
            return times, caps
        later, closed = self.closed_caps()
        beyond = later >= reach
        return np.append(times, later[beyond]), np.append(caps, closed[beyond])

    def choose(self, limits: tuple[Ints, Ints]) -> Bools | None:
        """The `wanted` free rows of earliest deadline that keep to the caps; None if there are not
        so many."""
        times, caps = limits
        caps = np.minimum.accumulate(caps[::-1])[::-1]
        candidates = np.flatnonzero(self.free)
        if not 0 <= self.wanted <= len(candidates):
            return None
        order = candidates[np.lexsort((-self.age[candidates], self.urgent[candidates]))]
        chosen = np.zeros(len(self.free), dtype=np.bool_)
        chosen[order[: self.wanted]] = True
        young = np.sort(self.age[chosen])
        if (np.searchsorted(young, times, side="right") <= caps).all():
            return chosen
        room = np.append(caps, self.wanted)[np.searchsorted(times, self.age[order])]
        taken = _by_deadline(np.minimum(room, self.wanted).tolist(), self.wanted)
        if taken is None:
            return None
        chosen[:] = False
        chosen[order[taken]] = True
        return chosen


def _nested(key: Ints, limit: int) -> tuple[Ints, Ints]:
    """The groups by `key`, and where in that order each set {key <= u}, u < limit, ends."""
    order = np.argsort(key, kind="stable")
    ranked = key[order]
    ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
    return order, ends[ranked[ends] < limit]


def _above(values: Floats) -> Floats:
    """The sum of what follows each entry."""
    return np.append(np.cumsum(values[::-1])[::-1][1:], 0.0)


def _by_deadline(room: list[int], wanted: int) -> list[int] | None:
    """Greedy over a nested matroid: item i may take any free place numbered 1..room[i]."""
    place = list(range(wanted + 1))  # union-find to the highest free place at or below

    def free(at: int) -> int:
        while place[at] != at:
            place[at] = place[place[at]]
            at = place[at]
        return at

    taken: list[int] = []
    for item, most in enumerate(room):
        at = free(most) if most > 0 else 0
        if at:
            place[at] = at - 1
            taken.append(item)
            if len(taken) == wanted:
                break
    return taken if len(taken) == wanted else None


def ramp(counts: Ints) -> tuple[Ints, Ints]:
    """counts (2, 3) -> index (0, 0, 1, 1, 1) and number (0, 1, 0, 1, 2)."""
    index = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)
    return index, number


def fill_block(
    shares: Shares, before: Boundary, skip: Ints, due: Ints, length: int
) -> tuple[Ints, Ints]:
    """Order a block: of every group the rows skip + 1 .. due, counted from `before.whole`."""
    busy = np.flatnonzero(due > skip)
    jobs = due[busy] - skip[busy]
    at, number = ramp(jobs + 1)  # one more in front: a window begins where the one before ends
    group = busy[at]
    number = number + skip[group]
    part, rate = before.part[group], shares.rate[group]
    ends = np.minimum(crossing(part, rate, number, shares.modulus), length + 1)
    even = advance(part, rate, ends.astype(np.uint64), shares.modulus)[1] == 0
    own = np.flatnonzero(number > skip[group])
    begin = np.maximum(ends[own - 1] + even[own - 1], 1)
    end = np.minimum(ends[own], length)
    if len(own) != length:
        raise PolytaskError(f"a block of {length} rows was given {len(own)}")
    order = _order(begin, end, length)
    group, number = group[own][order], number[own][order]
    return group, before.whole[group] + number - 1


def _order(begin: Ints, end: Ints, length: int) -> Ints:
    """Rows in the order they come: each in its window begin..end (slots from 1)."""
    slots = np.arange(1, length + 1)
    # By the middle of the window, then its end: enough where shares are alike. A few rows that come
    # out just before or behind their window are moved into it.
    order = np.argsort((begin + end) * (2 * length) + end, kind="stable")
    for _ in range(4):
        first, last = begin[order], end[order]
        early, late = first > slots, slots > last
        wrong = np.count_nonzero(early | late)
        if wrong == 0:
            return order
        if wrong > length // 8:
            break
        place = np.where(early, 2 * first + 1, np.where(late, 2 * last - 1, 2 * slots))
        order = order[np.argsort(place, kind="stable")]
    by_begin = np.argsort(begin, kind="stable")
    take = iter((end * length + np.arange(length))[by_begin].tolist()).__next__
    heap: list[int] = []
    out: list[int] = []
    push, pop, push_pop, add = heapq.heappush, heapq.heappop, heapq.heappushpop, out.append
    for arrived in np.bincount(begin, minlength=length + 1)[1:].tolist():
        if arrived == 1:
            add(push_pop(heap, take()))
        elif arrived:
            for _ in range(arrived - 1):
                push(heap, take())
            add(push_pop(heap, take()))
        elif heap:
            add(pop(heap))
        else:
            raise PolytaskError("a block of the mixture has an empty slot")
    order = np.array(out, dtype=np.int64) % length
    if (slots > end[order]).any():
        raise PolytaskError("a block of the mixture misses a window")
    return order
