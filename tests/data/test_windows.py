from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polytask.data.calendar import Frequency
from polytask.data.windows import Record, WindowSet, downsample, univariate
from polytask.errors import DataError

DAY = Frequency.named("D")


def record(length: int, offset: float = 0.0, frequency: Frequency = DAY) -> Record:
    return Record((np.arange(length, dtype=np.float32) + offset)[:, None], frequency)


@given(
    st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(1, 8),
    st.integers(1, 5),
    st.integers(1, 3),
)
def test_windows_equal_a_slow_enumeration(
    lengths: list[list[int]], context: int, horizon: int, stride: int
) -> None:
    data = {
        str(d): [record(n, 1000 * d + 100 * s) for s, n in enumerate(series)]
        for d, series in enumerate(lengths)
    }
    slow: dict[int, list[tuple[int, np.ndarray, np.ndarray]]] = {}
    for d, series in enumerate(data.values()):
        slow[d] = []
        for s, item in enumerate(series):
            shortest = min(context, horizon)
            for split in range(shortest, len(item.values) - horizon + 1, stride):
                past = np.full((context, 1), np.nan, np.float32)
                real = item.values[max(0, split - context) : split]
                past[context - len(real) :] = real
                slow[d].append((s, past, item.values[split : split + horizon]))
    if any(not windows for windows in slow.values()):
        with pytest.raises(DataError, match="has no series of"):
            WindowSet(data, context, horizon, stride=stride)
        return
    fast = WindowSet(data, context, horizon, stride=stride)
    assert fast.sizes == tuple(len(windows) for windows in slow.values())
    dataset = np.concatenate([np.full(n, d) for d, n in enumerate(fast.sizes)])
    index = np.concatenate([np.arange(n) for n in fast.sizes])
    got = fast.gather(dataset, index)
    expected = [window for windows in slow.values() for window in windows]
    assert got.series.tolist() == [s for s, _, _ in expected]
    assert np.array_equal(got.past, np.stack([p for _, p, _ in expected]), equal_nan=True)
    assert np.array_equal(got.future, np.stack([f for _, _, f in expected]))


def test_changing_the_future_does_not_change_the_past() -> None:
    clean = record(40)
    spoilt = Record(clean.values.copy(), DAY)
    spoilt.values[30:] = 1e9
    for item in (clean, spoilt):
        windows = WindowSet({"a": [item]}, 10, 5).gather(np.array([0]), np.array([20]))
        assert windows.past[0, -1, 0] == 24.0


def test_downsampling_averages_whole_blocks_that_end_at_the_last_step() -> None:
    hourly = record(13, frequency=Frequency.named("10min"))
    coarse = downsample(hourly, 3)
    assert coarse is not None
    assert coarse.frequency.name == "30min"
    assert coarse.values[:, 0].tolist() == [2.0, 5.0, 8.0, 11.0]


def test_downsampling_leaves_out_missing_steps() -> None:
    values = np.array([[1.0], [np.nan], [np.nan], [np.nan], [5.0], [7.0]], np.float32)
    coarse = downsample(Record(values, Frequency.named("min")), 2)
    assert coarse is not None
    assert np.array_equal(coarse.values[:, 0], [1.0, np.nan, 6.0], equal_nan=True)


def test_a_resolution_without_a_name_is_left_out() -> None:
    assert downsample(record(100), 3) is None


def test_every_channel_becomes_a_series() -> None:
    both = Record(np.stack([np.arange(5.0), np.arange(5.0) * 2], 1).astype(np.float32), DAY)
    first, second = univariate([both])
    assert second.values[:, 0].tolist() == [0.0, 2.0, 4.0, 6.0, 8.0]
    assert np.shares_memory(first.values, both.values)
