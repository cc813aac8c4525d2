"""Packing rows that take room of two kinds, inputs and targets, into bins with two widths."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polytask.errors import DataError
from polytask.mixture.packing import pack_two

PIECES = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 6)), min_size=1, max_size=30)


@given(PIECES)
@settings(max_examples=60, deadline=None)
def test_every_row_fits_its_bin_on_both_sides(rows: list[tuple[int, int]]) -> None:
    first, second = (np.array(side) for side in zip(*rows, strict=True))
    bins = pack_two(first, second, 9, 6)
    assert np.bincount(bins, first).max() <= 9 and np.bincount(bins, second).max() <= 6
    # Numbered by their earliest row, none is empty.
    earliest = [int(np.argmax(bins == b)) for b in range(bins.max() + 1)]
    assert earliest == sorted(earliest) and set(bins.tolist()) == set(range(len(earliest)))
    # First fit never leaves two bins that would go into one.
    for a in range(len(earliest)):
        for b in range(a):
            both = (bins == a) | (bins == b)
            assert first[both].sum() > 9 or second[both].sum() > 6


def test_rows_that_fill_each_others_gaps_share_a_bin() -> None:
    assert pack_two(np.array([8, 1, 8, 1]), np.array([1, 5, 1, 5]), 9, 6).tolist() == [0, 0, 1, 1]


def test_a_row_wider_than_a_bin_is_named() -> None:
    with pytest.raises(DataError, match="row 1 takes 3 and 7 places"):
        pack_two(np.array([1, 3]), np.array([1, 7]), 9, 6)
