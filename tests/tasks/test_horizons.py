"""Forecasting windows cut from long series: no future in training, gaps, short series."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polytask.data.rows import MemoryRows
from polytask.errors import TaskError
from polytask.tasks import Processor, ProcessorConfig, Task, TaskSet
from polytask.tasks.horizons import WindowRows, cut_windows
from polytask.tasks.schemas import Forecasting


def cut(lengths: list[int], **options: Any) -> dict[str, WindowRows]:
    rows = MemoryRows([{"s": np.arange(n, dtype=float)} for n in lengths])
    given_options = {"horizon": 3, "context": 5, "stride": 1, "valid": 0.1, "test": 0.2}
    return cut_windows(rows, ("s",), what="task 'f'", **{**given_options, **options})


@given(st.lists(st.integers(0, 60), min_size=1, max_size=5), st.integers(1, 6), st.integers(1, 4))
def test_training_windows_end_before_any_judged_future_begins(
    lengths: list[int], horizon: int, stride: int
) -> None:
    lengths = [*[n + 1 for n in lengths], 80]
    parts = cut(lengths, horizon=horizon, stride=stride)
    for series, _ in enumerate(lengths):
        futures = {
            name: [rows[i]["future"][:, 0] for i in np.flatnonzero(rows.owner == series)]
            for name, rows in parts.items()
        }
        for earlier, later in (("train", "valid"), ("train", "test"), ("valid", "test")):
            if futures.get(earlier) and futures.get(later):
                last = max(f.max() for f in futures[earlier])
                assert last < min(f.min() for f in futures[later])


def test_a_window_holds_the_steps_before_and_after_its_cut() -> None:
    train = cut([40])["train"]
    assert train[0]["s"].shape == (3, 1)  # as many steps as the horizon has, at least
    row = train[8]
    np.testing.assert_array_equal(row["s"][:, 0], np.arange(6, 11))
    np.testing.assert_array_equal(row["future"][:, 0], np.arange(11, 14))
    assert train.where(8) == "memory, row 1, steps 11 to 14"


def test_judged_windows_do_not_overlap_and_cover_the_held_out_steps() -> None:
    test = cut([100])["test"]
    futures = np.concatenate([test[i]["future"][:, 0] for i in range(len(test))])
    np.testing.assert_array_equal(futures, np.arange(80, 98))


def test_take_gathers_rows_in_the_order_asked_for() -> None:
    train = cut([40, 50])["train"]
    for row, index in zip(train.take([25, 3, 25]), [25, 3, 25]):
        np.testing.assert_array_equal(row["future"], train[index]["future"])


def test_windows_without_any_known_value_are_left_out() -> None:
    values = np.arange(60.0)
    values[20:30] = math.nan
    rows = MemoryRows([{"s": values}])
    parts = cut_windows(
        rows, ("s",), horizon=3, context=5, stride=1, valid=0.1, test=0.2, what="task 'f'"
    )
    train = parts["train"]
    for i in range(len(train)):
        assert np.isfinite(train[i]["s"]).any() and np.isfinite(train[i]["future"]).any()
    assert 22 not in train.cut.tolist() and 18 in train.cut.tolist()


def test_series_that_are_all_too_short_are_an_error() -> None:
    with pytest.raises(TaskError, match=r"task 'f': no series .*the longest has 8 steps"):
        cut([8, 5])


def series_rows() -> list[dict[str, Any]]:
    time = np.arange(120)
    return [
        {"demand": np.sin(time / 6 + k) + k, "weather": np.cos(time / 6 + k), "shop": f"s{k}"}
        for k in range(4)
    ]


def test_a_task_on_long_series_needs_only_a_horizon() -> None:
    task = Task.from_rows("f", series_rows(), inputs={"series": "demand"}, horizon=6, context=12)
    assert task.schema == Forecasting(6, 1)
    processor = Processor.fit(TaskSet.of(task), ProcessorConfig(vocab_size=310, series_length=12))
    for name in ("train", "valid", "test"):
        rows = task.splits[name].take([0, 5])  # type: ignore[union-attr]
        for example in processor.encode(0, rows):
            assert example.sequences[0]["series.values"].shape[0] <= 12
            assert example.targets[0].shape == (6, 1)


def test_several_channels_are_forecast_together() -> None:
    task = Task.from_rows(
        "f", series_rows(), inputs={"series": ["demand", "weather"]}, horizon=6, context=12
    )
    assert task.schema == Forecasting(6, 2)
    processor = Processor.fit(TaskSet.of(task), ProcessorConfig(vocab_size=310, series_length=12))
    row = task.splits["train"][35]  # type: ignore[index]
    (example,) = processor.encode(0, [row])
    assert example.sequences[0]["series.values"].shape == (12, 2)
    np.testing.assert_allclose(
        example.targets[0][:, 1], np.float32(series_rows()[0]["weather"][41:47])
    )
    raw = {name: values[:20] for name, values in series_rows()[0].items() if name != "shop"}
    (new,) = processor.encode(0, [raw], with_targets=False)
    np.testing.assert_allclose(
        new.sequences[0]["series.values"][:, 1], np.float32(raw["weather"][-12:])
    )


def test_windows_are_only_split_by_time() -> None:
    with pytest.raises(TaskError, match="split by time, not by 'random'"):
        Task.from_rows(
            "f", series_rows(), inputs={"series": "demand"}, horizon=6, split={"kind": "random"}
        )


def test_forecasting_without_target_and_horizon_is_refused() -> None:
    with pytest.raises(TaskError, match="needs 'horizon'"):
        Task.from_rows("f", series_rows(), inputs={"series": "demand"}, schema="forecasting")


def test_given_test_series_are_judged_on_their_last_window() -> None:
    rows = series_rows()
    data = {"train": rows[:3], "test": rows[3:]}
    task = Task.from_rows("f", data, inputs={"series": "demand"}, horizon=6, context=12)
    test = task.splits["test"]
    assert len(test) == 1  # type: ignore[arg-type]
    np.testing.assert_allclose(test[0]["future"][:, 0], np.float32(rows[3]["demand"][-6:]))  # type: ignore[index]
