"""Integer quotas against Python's whole numbers, which have no limit."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polytask.mixture.quota import (
    FINE,
    advance,
    coarse_shares,
    crossing,
    fine_shares,
    whole_numbers,
)

parts = st.integers(0, FINE - 1)
rates = st.integers(1, FINE)


def array(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint64)


@given(parts, rates, st.integers(0, 2**62 - 1))
def test_fine_quotas_are_exact(part: int, rate: int, time: int) -> None:
    if rate * time // FINE >= 2**62:
        time >>= 1
    whole, left = advance(array(part), array(rate), array(time), FINE)
    assert (int(whole[0]), int(left[0])) == divmod(part + rate * time, FINE)


@given(st.integers(2, 2**31 - 1), st.data())
def test_coarse_quotas_are_exact(modulus: int, data: st.DataObject) -> None:
    part, rate = data.draw(st.integers(0, modulus - 1)), data.draw(st.integers(1, modulus))
    time = data.draw(st.integers(0, 2**31 - 1))
    whole, left = advance(array(part), array(rate), array(time), modulus)
    assert (int(whole[0]), int(left[0])) == divmod(part + rate * time, modulus)


@given(parts, st.integers(2**38, FINE), st.integers(0, 40))
def test_crossing_is_the_first_slot_at_which_a_row_is_due(part: int, rate: int, row: int) -> None:
    expected = max(0, -((part - row * FINE) // rate))
    if expected < 2**31 - 2:
        found = crossing(array(part), array(rate), np.array([row]), FINE)
        assert int(found[0]) == expected


@given(st.lists(st.floats(1e-12, 1e12), min_size=1, max_size=50))
def test_fine_shares_add_up_exactly_and_follow_the_weights(weights: list[float]) -> None:
    given_ = np.array(weights)
    shares = fine_shares(given_)
    assert sum(shares.rate.tolist()) == FINE
    assert (shares.rate > 0).all()
    np.testing.assert_allclose(shares.weights, given_ / given_.sum(), rtol=1e-12, atol=1e-16)


@given(st.lists(st.integers(0, 3_000_000), min_size=1, max_size=12).filter(any))
def test_ratios_of_whole_numbers_are_recognised(rows: list[int]) -> None:
    found = whole_numbers(np.array(rows, dtype=np.float64))
    common = np.gcd.reduce(np.array(rows))
    np.testing.assert_array_equal(found, np.array(rows) // common)


def test_ratios_of_large_numbers_are_not() -> None:
    assert whole_numbers(np.array([1.0, np.sqrt(2), np.pi])) is None


def test_slots_until_a_group_is_due_some_rows() -> None:
    shares = coarse_shares(np.array([2, 3]))
    limit = np.array([7, 7])
    # at slot t the groups are due 2t/5 and 3t/5 rows
    assert shares.slots_until(limit, 0) == int(Fraction(7) / Fraction(2, 5))
    assert shares.slots_until(limit, 1) == int(Fraction(7) / Fraction(3, 5))


@pytest.mark.parametrize("time", [0, 1, 5, 10**6, 2**40])
def test_due_counts_on_from_a_part(time: int) -> None:
    shares = fine_shares(np.array([0.3, 0.7]))
    part = array(FINE // 2, FINE // 4)
    whole, left = shares.due(time, part)
    for at in range(2):
        expected = divmod(int(part[at]) + int(shares.rate[at]) * time, FINE)
        assert (int(whole[at]), int(left[at])) == expected
