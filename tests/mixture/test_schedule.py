"""The order of groups, against counting every prefix."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mixture_checks import MARGIN, counts_of, fluid, weight_vectors, worst_deviation

from polytask.errors import PolytaskError
from polytask.mixture import plan as plans
from polytask.mixture import schedule
from polytask.mixture.plan import EndlessPlan, StoppingPlan, even, make_plan
from polytask.mixture.quota import Shares, coarse_shares, fine_shares
from polytask.mixture.schedule import Boundary, Leg, Stretch


def drawn(plan: plans.Plan, rows: int) -> tuple[np.ndarray, np.ndarray]:
    groups, ordinals, slot = [], [], 0
    while slot < rows and (plan.total is None or slot < plan.total):
        first, group, ordinal = plan.block(slot)
        assert first == slot
        groups.append(group)
        ordinals.append(ordinal)
        slot += len(group)
    return np.concatenate(groups)[:rows], np.concatenate(ordinals)[:rows]


@given(weight_vectors(300))
@settings(max_examples=25, deadline=None)
def test_every_prefix_is_within_one_row_of_the_weights(weights: np.ndarray) -> None:
    groups, _ = drawn(make_plan(weights), 20_000)
    assert worst_deviation(groups, weights) <= 1 + MARGIN


@pytest.mark.slow
@given(weight_vectors(300))
@settings(max_examples=12, deadline=None)
def test_every_prefix_of_a_hundred_thousand_rows_is(weights: np.ndarray) -> None:
    groups, _ = drawn(make_plan(weights), 100_000)
    assert worst_deviation(groups, weights) <= 1 + MARGIN


@given(weight_vectors(40), st.sampled_from([1, 2, 16, 128]), st.integers(0, 10**7))
@settings(max_examples=60, deadline=None)
def test_blocks_anywhere_agree_with_the_counts_at_their_ends(
    weights: np.ndarray, block: int, far: int
) -> None:
    leg = Leg(fine_shares(weights), even(len(weights)), None, block)
    number = far // block
    for at in range(number, number + 5):
        groups, ordinals = leg.fill(at)
        before, after = leg.boundary(at * block).count, leg.boundary((at + 1) * block).count
        counts = before + counts_of(groups, len(weights))
        np.testing.assert_array_equal(counts[np.arange(block), groups] - 1, ordinals)
        np.testing.assert_array_equal(counts[-1], after)
        slots = at * block + np.arange(1, block + 1)
        assert np.abs(counts - weights * slots[:, None]).max() <= 1 + 1e-4


def test_a_cold_seek_gives_the_rows_of_a_sequential_pass() -> None:
    weights = np.random.default_rng(0).random(30)
    in_order = EndlessPlan(weights)
    for number in range(60):
        first, group, ordinal = in_order.block(number * 4096)
        if number in (1, 7, 32, 59):
            cold = EndlessPlan(weights).block(number * 4096 + 17)
            assert cold[0] == first
            np.testing.assert_array_equal(cold[1], group)
            np.testing.assert_array_equal(cold[2], ordinal)


@given(weight_vectors(12), st.sampled_from([4, 64]))
@settings(max_examples=15, deadline=None)
def test_counted_caps_lead_to_orders_within_one_row_too(weights: np.ndarray, block: int) -> None:
    leg = Leg(fine_shares(weights), even(len(weights)), None, block)
    refuse = schedule._Case.urgent_served
    schedule._Case.urgent_served = lambda self, done: False  # type: ignore[method-assign]
    try:
        groups = np.concatenate([leg.fill(number)[0] for number in range(20)])
    finally:
        schedule._Case.urgent_served = refuse  # type: ignore[method-assign]
    assert leg.exact_caps > 0
    assert worst_deviation(groups, weights) <= 1 + MARGIN


@given(weight_vectors(30), st.integers(1, 10**5))
@settings(max_examples=40, deadline=None)
def test_the_closed_caps_never_exceed_the_counted_ones(weights: np.ndarray, time: int) -> None:
    shares = fine_shares(weights)
    _, part = shares.due(time)
    age = np.minimum(schedule.age_of(part, shares), time)
    none = np.zeros(len(weights), dtype=np.bool_)
    case = schedule._Case(shares, part, age, age, part > 0, none, 0, time, 10**9, ())
    times, counted = case.exact_caps()
    rate, left = [int(r) for r in shares.rate], [int(p) for p in part]
    for at in range(0, len(times), max(1, len(times) // 20)):
        back = int(times[at])
        forced = sum(max(0, (r * back - p) // shares.modulus) for r, p in zip(rate, left))
        assert counted[at] == back - forced
    for back, cap in zip(*case.closed_caps()):
        if back in times:
            assert cap <= counted[np.searchsorted(times, back)]


def test_a_choice_among_nested_sets_is_the_most_urgent_possible() -> None:
    random = np.random.default_rng(4)
    for _ in range(200):
        size = int(random.integers(1, 9))
        room = random.integers(0, 5, size).tolist()
        wanted = int(random.integers(0, size + 1))
        feasible = []
        for mask in range(1 << size):
            chosen = [i for i in range(size) if mask >> i & 1]
            fits = all(sum(room[j] <= k for j in chosen) <= k for k in range(5))
            if len(chosen) == wanted and fits:
                feasible.append(chosen)
        found = schedule._by_deadline([min(r, wanted) for r in room], wanted) if wanted else []
        assert found == (min(feasible) if feasible else None)


def test_an_impossible_boundary_is_an_error() -> None:
    shares = coarse_shares(np.array([1, 1]))
    late = Boundary(np.array([0, 0]), np.array([1, 1], np.uint64), np.array([False, False]))
    leg = Leg(shares, late, 3, 4)
    with pytest.raises(PolytaskError, match="no order within one row"):
        leg.settle(1, 0, late, None, None)


stops = st.lists(st.integers(-1, 60), min_size=1, max_size=12)


@given(stops, st.integers(0, 2**32 - 1), st.sampled_from([0.0, 1.0, 3.0]))
@settings(max_examples=40, deadline=None)
def test_groups_stop_at_their_limit_and_leave_their_weight_to_the_others(
    limits: list[int], seed: int, spread: float
) -> None:
    limit = np.array([1 if x == 0 else x for x in limits])
    if (limit < 0).all():
        limit[0] = 5
    weights = np.exp(np.random.default_rng(seed).normal(0, spread, len(limit)))
    plan = StoppingPlan(weights, limit)
    rows = 400 if plan.total is None else min(400, plan.total)
    groups, ordinals = drawn(plan, rows)
    counts = counts_of(groups, len(limit))
    quota = fluid(weights, limit, rows)
    assert np.abs(counts - quota).max() <= 1 + MARGIN
    np.testing.assert_array_equal(counts[np.arange(rows), groups] - 1, ordinals)
    np.testing.assert_allclose(plan.due(rows), quota[-1], atol=1e-6)
    if plan.total == rows:
        np.testing.assert_array_equal(counts[-1], limit)


def test_stops_are_exact_across_many_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "block_length", lambda groups: 8)
    random = np.random.default_rng(2)
    weights, limit = np.exp(random.normal(0, 2, 25)), random.integers(1, 90, 25)
    plan = StoppingPlan(weights, limit)
    groups, _ = drawn(plan, int(limit.sum()))
    counts = counts_of(groups, 25)
    assert np.abs(counts - fluid(weights, limit, len(groups))).max() <= 1 + MARGIN


def test_deadlines_pass_through_changing_shares() -> None:
    slow = Shares(np.array([1, 9], np.uint64), 10)
    fast = Shares(np.array([5, 5], np.uint64), 10)
    both = np.array([True, True])
    # group 0 lacks 7 tenths: 3 slots at 1/10 leave 4, then one at 5/10
    part = np.array([3, 0], dtype=np.uint64)
    slots, seen = schedule.deadlines(part, [Stretch(slow, 3, both), Stretch(fast, None, both)])
    assert slots.tolist() == [4, 2]
    assert len(seen) == 2
