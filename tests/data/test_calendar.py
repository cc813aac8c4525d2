from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from polytask.data.calendar import TOKENS, Frequency, infer
from polytask.errors import DataError

PANDAS = ["s", "min", "5min", "30min", "h", "2h", "D", "W", "MS", "ME", "QS", "QE", "YS", "YE"]


def stamps(start: str, periods: int, freq: str) -> np.ndarray:
    return pd.date_range(start, periods=periods, freq=freq).to_numpy().astype("datetime64[s]")


@pytest.mark.parametrize("freq", PANDAS)
def test_the_step_is_inferred_and_continued_as_pandas_would(freq: str) -> None:
    all_stamps = stamps("2019-12-31", 60, freq)
    frequency = infer(all_stamps[:40])
    assert np.array_equal(frequency.after(all_stamps[39], 20), all_stamps[40:])


@pytest.mark.parametrize("freq", PANDAS)
def test_gaps_do_not_hide_the_step(freq: str) -> None:
    kept = np.delete(stamps("2019-12-31", 40, freq), [3, 4, 17])
    places = infer(kept).positions(kept)
    assert np.array_equal(places, np.delete(np.arange(40), [3, 4, 17]))


def test_month_ends_of_different_length_are_one_frequency() -> None:
    days = np.array(["2023-11-30", "2023-12-31", "2024-01-31", "2024-02-29"], "datetime64[s]")
    assert infer(days).name == "M"
    assert str(infer(days).after(days[-1], 1)[0])[:10] == "2024-03-31"


def test_the_day_of_the_month_is_kept() -> None:
    days = np.array(["2023-04-15", "2023-05-15", "2023-06-15"], "datetime64[s]")
    assert str(infer(days).after(days[-1], 1)[0])[:10] == "2023-07-15"


def test_a_stamp_off_the_grid_is_named() -> None:
    days = stamps("2024-01-01", 20, "D")
    days[7] += np.timedelta64(3601, "s")
    with pytest.raises(DataError, match=r"irregular timestamp 2024-01-08 01:00:01"):
        Frequency.named("D").positions(days)


def test_stamps_without_a_common_step_are_refused() -> None:
    seconds = np.array([0, 1, 5, 12, 20, 33, 47]).astype("datetime64[s]")
    with pytest.raises(DataError, match="no common step"):
        infer(seconds)


def test_two_stamps_are_too_few_to_infer() -> None:
    with pytest.raises(DataError, match="give `frequency`"):
        infer(stamps("2024-01-01", 2, "D"))


@pytest.mark.parametrize("name", [n for n in TOKENS if n != "other"])
def test_a_name_survives_the_round_trip(name: str) -> None:
    assert Frequency.named(name).name == name
    assert Frequency.named(name).token == TOKENS[name]


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(DataError, match=r"Did you mean '30min'"):
        Frequency.named("30mn")
