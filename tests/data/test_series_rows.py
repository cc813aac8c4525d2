"""Tables with one row per moment become rows of series."""

import datetime

import numpy as np
import pytest

from polytask.data.open import open_rows
from polytask.data.rows import MemoryRows
from polytask.data.series import parse_times, series_rows
from polytask.data.spec import DataSpec, SeriesSpec
from polytask.errors import DataError


def test_rows_are_gathered_by_series_and_sorted_by_time(tmp_path):
    (tmp_path / "s.csv").write_text(
        "day,shop,units,price\n2024-01-03,B,5,1.5\n2024-01-01,A,1,\n2024-01-02,A,2,2.5\n"
        "2024-01-01,B,3,0.5\n"
    )
    spec = {"path": "s.csv", "series": {"time": "day", "values": ["units", "price"], "by": "shop"}}
    source = open_rows(DataSpec.of(spec), tmp_path)
    by_shop = {row["shop"]: row for row in source.take(range(len(source)))}
    np.testing.assert_array_equal(by_shop["A"]["series"], np.float32([[1, np.nan], [2, 2.5]]))
    np.testing.assert_array_equal(by_shop["B"]["series"], np.float32([[3, 0.5], [5, 1.5]]))
    assert by_shop["A"]["series"].dtype == np.float32
    assert (by_shop["B"]["start"], by_shop["B"]["time"]) == ("2024-01-01", "2024-01-03")
    assert source.where(0) == "s.csv, series 'B', 2024-01-01 to 2024-01-03"


@pytest.mark.parametrize(("length", "window", "stride"), [(10, 4, 3), (10, 4, None), (4, 4, 1)])
def test_windows_end_at_the_last_moment_a_stride_apart(length, window, stride):
    source = MemoryRows([{"t": i, "v": float(i)} for i in range(length)])
    made = series_rows(source, SeriesSpec(time="t", values=("v",), window=window, stride=stride))
    ends = sorted(range(length, window - 1, -(stride or window)))
    assert [row["series"][:, 0].tolist() for row in made.rows] == [
        list(map(float, range(end - window, end))) for end in ends
    ]
    assert [row["time"] for row in made.rows] == [end - 1 for end in ends]


def test_unreadable_and_repeated_moments_are_bad_rows():
    rows = [{"t": f"2024-01-{day:02}", "v": day} for day in range(1, 21)]
    rows[3] = {"t": "soon", "v": 0}
    rows[7] = {"t": "2024-01-01", "v": 9}
    source = MemoryRows(rows, "x")
    made = series_rows(source, SeriesSpec(time="t", values=("v",)), max_bad=0.1)
    assert len(made.rows[0]["series"]) == 18
    assert made.problems.first == [
        "x, row 4: no moment can be read in column 't'",
        "x, row 8: its moment is there already (x, row 1)",
    ]
    with pytest.raises(DataError, match="2 of 20 rows"):
        series_rows(source, SeriesSpec(time="t", values=("v",)))


def test_what_is_not_a_series_is_named():
    source = MemoryRows([{"t": 1, "v": 1.0}, {"t": 2, "v": "x"}], "x")
    with pytest.raises(DataError, match="x, row 2: 'x' in column 'v' is not a number"):
        series_rows(source, SeriesSpec(time="t", values=("v",)))
    with pytest.raises(DataError, match="column 'w' is missing in x"):
        series_rows(source, SeriesSpec(time="t", values=("w",)))
    numbers = MemoryRows([{"t": 1, "v": 1.0}], "x")
    with pytest.raises(DataError, match="no series is as long as the window of 5"):
        series_rows(numbers, SeriesSpec(time="t", values=("v",), window=5))


@pytest.mark.parametrize(
    "form",
    [
        "%Y-%m-%d",
        "%Y-%m-%dT%H:%M:%S",
        "%Y/%m/%d",
        "%d.%m.%Y",
        "%d/%m/%Y %H:%M",
        "%m/%d/%Y",
        "%Y-%m",
    ],
)
def test_common_ways_to_write_a_date_are_read(form):
    days = [datetime.datetime(2024, month, day) for month in (1, 7) for day in (1, 20)]
    expected = [datetime.datetime.strptime(d.strftime(form), form) for d in days]
    seconds = [d.replace(tzinfo=datetime.UTC).timestamp() for d in expected]
    assert parse_times([d.strftime(form) for d in days], "x") == seconds


def test_day_first_or_month_first_must_be_clear():
    with pytest.raises(DataError, match="'01/02/2024' may be day first or month first"):
        parse_times(["01/02/2024", "03/04/2024"], "x")
    assert parse_times(["05/05/2024"], "x") == parse_times(["2024-05-05"], "x")


def test_numbers_dates_and_zones_are_moments():
    day = datetime.date(2024, 1, 1)
    assert parse_times([day, datetime.datetime(2024, 1, 1)], "x") == [1704067200.0] * 2
    assert parse_times(["2024-01-01T02:00:00+02:00", ""], "x") == [1704067200.0, None]
    assert parse_times([3, 2.5, None, float("nan"), True], "x") == [3.0, 2.5, None, None, None]
    assert parse_times(["soon", "later"], "x") == [None, None]
