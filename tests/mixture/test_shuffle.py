"""The shuffled order that is computed, not stored."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2

from polytask.mixture.shuffle import permute


def test_every_row_comes_once_for_every_size_up_to_two_thousand() -> None:
    for size in range(1, 2001):
        order = permute(3, 5, 7, np.arange(size), size)
        assert (np.bincount(order, minlength=size) == 1).all() and len(order) == size


@given(st.integers(2, 2**61), st.integers(0, 2**61), st.integers(0, 1000))
def test_any_position_of_a_huge_order_is_inside_it(size: int, position: int, epoch: int) -> None:
    where = position % size
    assert 0 <= int(permute(0, 0, epoch, where, size)) < size


def test_positions_can_be_asked_for_in_any_order_and_mixed_groups() -> None:
    size = np.array([10, 700, 33])
    group = np.random.default_rng(0).integers(0, 3, 500)
    position = np.random.default_rng(1).integers(0, 10**6, 500) % size[group]
    together = permute(9, group, 2, position, size[group])
    alone = [int(permute(9, g, 2, p, size[g])) for g, p in zip(group, position)]
    assert together.tolist() == alone


@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_orders_of_a_few_rows_are_equally_likely(size: int) -> None:
    epochs = 12_000
    epoch, position = np.repeat(np.arange(epochs), size), np.tile(np.arange(size), epochs)
    orders = Counter(map(tuple, permute(1, 0, epoch, position, size).reshape(epochs, size)))
    expected = epochs / math.factorial(size)
    assert len(orders) == math.factorial(size)
    statistic = sum((n - expected) ** 2 / expected for n in orders.values())
    assert chi2.sf(statistic, len(orders) - 1) > 1e-4


@pytest.mark.parametrize("size", [5, 7, 30, 100])
def test_every_row_is_equally_likely_at_every_position(size: int) -> None:
    epochs = 10_000
    epoch, position = np.repeat(np.arange(epochs), size), np.tile(np.arange(size), epochs)
    row = permute(2, 1, epoch, position, size)
    table = np.bincount(position * size + row, minlength=size * size)
    expected = epochs / size
    statistic = ((table - expected) ** 2 / expected).sum()
    assert chi2.sf(statistic, (size - 1) ** 2) > 1e-4


def test_seeds_groups_and_epochs_give_unrelated_orders() -> None:
    size = 1000
    here = np.arange(size)
    base = permute(0, 0, 0, here, size)
    for other in (permute(1, 0, 0, here, size), permute(0, 1, 0, here, size)):
        assert (base == other).sum() < 10  # one is expected
    assert (base == permute(0, 0, 1, here, size)).sum() < 10
    assert abs(np.corrcoef(base, here)[0, 1]) < 0.1


def test_a_position_beyond_the_size_is_refused() -> None:
    with pytest.raises(ValueError, match="beyond the size"):
        permute(0, 0, 0, 5, 5)
