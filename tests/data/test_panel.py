from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from polytask.data.panel import read_panel
from polytask.errors import DataError


@pytest.fixture
def table() -> pd.DataFrame:
    days = pd.date_range("2024-01-01", periods=10, freq="D")
    return pd.DataFrame(
        {
            "shop": ["b"] * 10 + ["a"] * 10,
            "day": [*days, *days],
            "sales": np.arange(20.0),
            "holiday": [0, 1] * 10,
        }
    )


def read(table: object, **more: object) -> object:
    arguments: dict = {"timestamp": "day", "targets": ["sales"], "id": "shop", **more}
    return read_panel(table, **arguments)


def test_series_are_sorted_by_id_and_time(table: pd.DataFrame) -> None:
    panel = read(table.sample(frac=1, random_state=0))
    assert panel.ids == ("a", "b")
    assert np.array_equal(panel.history(0)[:, 0], np.arange(10.0, 20.0))
    assert np.array_equal(panel.history(1)[:, 0], np.arange(10.0))


def test_gaps_become_missing_and_are_counted(table: pd.DataFrame) -> None:
    panel = read(table.drop(index=[3, 4, 15]))
    assert panel.missing == 3
    assert np.isnan(panel.history(1)[3:5]).all()
    assert np.array_equal(panel.stamps(1), pd.date_range("2024-01-01", periods=10))


def test_rows_without_target_at_the_end_are_the_known_future(table: pd.DataFrame) -> None:
    table.loc[[8, 9], "sales"] = np.nan
    panel = read(table, controls=["holiday"])
    assert panel.known.tolist() == [0, 2]
    assert len(panel.history(1)) == 8
    assert panel.series(1)[8:, 1].tolist() == [0.0, 1.0]


def test_all_kinds_of_tables_give_one_panel(table: pd.DataFrame, tmp_path: Path) -> None:
    table.to_csv(tmp_path / "t.csv", index=False)
    table.to_csv(tmp_path / "t.tsv", index=False, sep="\t")
    table.to_parquet(tmp_path / "t.parquet")
    table.to_json(tmp_path / "t.jsonl", orient="records", lines=True, date_format="iso")
    whole = read(table).values
    for other in (pa.Table.from_pandas(table), *tmp_path.iterdir()):
        assert np.array_equal(read(other).values, whole)


class OnlyArrow:
    """A table that speaks the Arrow stream protocol and nothing else."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return self.table.__arrow_c_stream__(requested_schema)


def test_whatever_speaks_arrow_is_read(table: pd.DataFrame) -> None:
    found = read(OnlyArrow(pa.Table.from_pandas(table)))
    assert np.array_equal(found.values, read(table).values)


def test_polars_tables_are_read_and_lazy_ones_named(table: pd.DataFrame) -> None:
    polars = pytest.importorskip("polars")
    table.loc[3, "sales"] = np.nan
    whole = read(table, controls=["holiday"])
    for frame in (polars.from_pandas(table), polars.from_pandas(table.astype({"day": str}))):
        found = read(frame, controls=["holiday"])
        np.testing.assert_array_equal(found.values, whole.values)
        assert found.ids == whole.ids and found.first.tolist() == whole.first.tolist()
    with pytest.raises(DataError, match=r"a lazy table has no rows yet; give what its collect"):
        read(polars.from_pandas(table).lazy())


BAD = {
    "a missing column": (
        lambda t: t.rename(columns={"sales": "sale"}),
        r"'sales' is missing.*sale",
    ),
    "a repeated stamp": (lambda t: pd.concat([t, t.iloc[:1]]), r"'b' has two rows for 2024-01-01"),
    "an irregular stamp": (
        lambda t: t.assign(day=t.day.where(t.index != 5, t.day + pd.Timedelta("90min"))),
        r"series 'b': irregular timestamp 2024-01-06 01:30",
    ),
    "an unreadable stamp": (
        lambda t: t.assign(day=t.day.astype(str).where(t.index != 2, "soon")),
        r"row 3: 'soon' in column 'day' is not a timestamp",
    ),
    "a word among numbers": (
        lambda t: t.assign(sales=t.sales.astype(str).where(t.index != 4, "many")),
        r"row 5: 'many' in column 'sales' is not a finite number",
    ),
    "an infinite value": (
        lambda t: t.assign(sales=t.sales.where(t.index != 4, np.inf)),
        r"row 5: 'inf' in column 'sales'",
    ),
    "no rows": (lambda t: t.iloc[:0], "has no rows"),
    "a series without targets": (
        lambda t: t.assign(sales=t.sales.where(t.shop != "a")),
        r"series 'a' has no target value",
    ),
    "numbers as stamps": (lambda t: t.assign(day=range(20)), "holds numbers, not timestamps"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_tables_are_refused_by_name(what: str, table: pd.DataFrame) -> None:
    spoil, message = BAD[what]
    with pytest.raises(DataError, match=message):
        read(spoil(table))


def test_a_column_cannot_have_two_roles(table: pd.DataFrame) -> None:
    with pytest.raises(DataError, match="'sales' has two roles"):
        read(table, controls=["sales"])
