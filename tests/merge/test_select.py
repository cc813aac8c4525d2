"""Exact selection and sums, streamed or not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polytask import rng
from polytask.merge import select

FLOATS = st.floats(width=32, allow_nan=False)
LISTS = st.lists(FLOATS, min_size=1, max_size=60)


@given(LISTS, st.data())
def test_the_kth_magnitude_is_the_kth_of_the_sorted_ones(
    values: list[float], data: st.DataObject
) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    ranks = data.draw(st.lists(st.integers(0, len(values) - 1), min_size=1, max_size=3))
    wanted = np.sort(np.abs(x.numpy()))
    assert select.kth_magnitudes(x, *ranks) == [wanted[rank] for rank in ranks]


@given(LISTS)
def test_words_are_ordered_as_their_numbers_are(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    words = select.ordered_words(x)
    assert [select.from_ordered(int(w)) for w in words] == x.tolist()
    for i in range(len(values) - 1):
        a, b = float(x[i]), float(x[i + 1])
        assert (a < b) == (words[i] < words[i + 1]) and (a == b) == (words[i] == words[i + 1])
    assert [select.from_magnitude(int(w)) for w in select.magnitude_words(x)] == x.abs().tolist()


@given(LISTS, st.integers(1, 7), st.data())
def test_counts_of_pieces_find_the_same_value_as_the_whole(
    values: list[float], size: int, data: st.DataObject
) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    rank = data.draw(st.integers(0, len(values) - 1))
    pieces = [select.ordered_words(piece) for piece in x.split(size)]
    pieces.reverse()
    highs = [select.high_counts(piece) for piece in pieces]
    high, rest = select.find_bin(np.sum(highs, axis=0), rank)
    lows = np.sum([select.low_counts(piece, high) for piece in pieces], axis=0)
    found = select.from_ordered(high << 16 | select.find_bin(lows, rest)[0])
    assert found == np.sort(x.numpy())[rank]


def test_a_rank_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(IndexError, match="rank"):
        select.kth_magnitude(torch.ones(3), 3)
    with pytest.raises(IndexError, match="rank 2 of 2"):
        select.find_bin(np.array([1, 1]), 2)


@pytest.mark.parametrize("density", [0.2, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keeping_the_largest_keeps_exactly_the_top_fraction(
    density: float, dtype: torch.dtype
) -> None:
    x = torch.randperm(1000, generator=torch.Generator().manual_seed(1)).to(dtype) - 500.5
    kept = select.keep_largest_(x.clone(), density)
    order = x.abs().argsort(descending=True)
    assert torch.equal(kept[order[: select.kept(1000, density)]], x[order[: int(1000 * density)]])
    assert int((kept != 0).sum()) == pytest.approx(1000 * density, abs=1)


def test_all_magnitudes_equal_to_the_threshold_stay() -> None:
    x = torch.tensor([1.0, -1.0, 1.0, 0.5, -2.0, 0.0])
    assert select.keep_largest_(x.clone(), 1 / 3).tolist() == [1.0, -1.0, 1.0, 0.0, -2.0, 0.0]
    assert select.keep_largest_(torch.zeros(5), 0.2).tolist() == [0.0] * 5
    assert select.keep_largest_(torch.tensor(3.0), 0.1).tolist() == 3.0
    assert select.keep_largest_(torch.zeros(0), 0.1).numel() == 0


def test_selection_on_another_device_gives_the_same_value() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    x = torch.randn(10_001, generator=torch.Generator().manual_seed(0))
    ranks = (0, 17, 5000, 10_000)
    assert select.kth_magnitudes(x.cuda(), *ranks) == select.kth_magnitudes(x, *ranks)


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 300_001])
def test_sums_equal_those_in_float64_and_do_not_depend_on_threads(size: int) -> None:
    x = torch.randn(size, generator=torch.Generator().manual_seed(2))
    y = torch.randn(size, generator=torch.Generator().manual_seed(3))
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append((select.dot(x, y), select.mass(x)))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1]
    assert found[0][0] == pytest.approx(float(x.double() @ y.double()), rel=1e-5, abs=1e-4)
    assert found[0][1] == pytest.approx(float(x.double().abs().sum()), rel=1e-6)


@given(st.integers(0, 200), st.integers(0, 50))
def test_a_piece_gets_the_random_numbers_of_its_place(offset: int, count: int) -> None:
    whole = select.uniform_words(300, 0, 5, "a", "b")
    assert np.array_equal(
        select.uniform_words(count, offset, 5, "a", "b"), whole[offset : offset + count]
    )


def test_random_numbers_depend_on_seed_and_keys_and_are_uniform() -> None:
    first = select.uniform(100_000, 0, 1, "drop", "model", "tensor")
    assert float(first.mean()) == pytest.approx(0.5, abs=0.005) and float(first.max()) < 1
    for other in ((2, "drop", "model", "tensor"), (1, "drop", "model", "other")):
        second = select.uniform(100_000, 0, *other)
        assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.02


def test_a_generator_that_is_not_counter_based_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rng, "generator", lambda *_: np.random.default_rng(0))
    with pytest.raises(TypeError, match="counter-based"):
        select.uniform_words(3, 0, 0)
