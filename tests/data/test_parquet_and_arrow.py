"""Typed files: Parquet and Arrow."""

import datetime
import decimal
import itertools

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polytask.data.arrow import ArrowRows
from polytask.data.parquet import read_parquet, stream_parquet
from polytask.errors import DataError

counter = itertools.count()
ours = settings(deadline=None, max_examples=60)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
ROW = st.fixed_dictionaries(
    {
        "key": st.integers(0, 2**62),
        "text": TEXT | st.none(),
        "number": st.floats(allow_nan=False) | st.none(),
        "flag": st.booleans() | st.none(),
        "words": st.lists(TEXT, max_size=3) | st.none(),
        "bytes": st.binary(max_size=5) | st.none(),
    }
)
SCHEMA = pa.schema(
    {
        "key": pa.int64(),
        "text": pa.string(),
        "number": pa.float64(),
        "flag": pa.bool_(),
        "words": pa.list_(pa.string()),
        "bytes": pa.binary(),
    }
)


def write_arrow(table, path):
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return path


@ours
@given(st.lists(ROW, max_size=20), st.integers(1, 7))
def test_what_is_written_is_read_back(tmp_path_factory, rows, group):
    folder, number = tmp_path_factory.getbasetemp(), next(counter)
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    pq.write_table(table, folder / f"{number}.parquet", row_group_size=group)
    write_arrow(table, folder / f"{number}.arrow")
    parquet = read_parquet(folder / f"{number}.parquet")
    arrow = ArrowRows.open(folder / f"{number}.arrow")
    for source in (parquet, arrow):
        assert source.take(range(len(source))) == rows
        assert source.columns == tuple(SCHEMA.names)
    stream = stream_parquet(folder / f"{number}.parquet")
    for position in range(len(rows) + 2):
        assert list(stream.read_from(position)) == rows[position:]


def test_lists_of_floats_are_arrays_and_decimals_floats():
    table = pa.table(
        {
            "series": pa.array([[1.0, None, 3.0], [], None], pa.list_(pa.float32())),
            "grid": pa.array([[[1.0, 2.0], [3.0, 4.0]], [[5.0], [6.0, 7.0]], None]),
            "fixed": pa.array([[1.0, 2.0]] * 3, pa.list_(pa.float64(), 2)),
            "ints": pa.array([[1, 2], [3], None]),
            "price": pa.array([decimal.Decimal("1.25"), None, decimal.Decimal("-3.50")]),
            "day": pa.array([datetime.date(2024, 1, 2)] * 3),
            "kind": pa.array(["a", "b", "a"]).dictionary_encode(),
            "image": pa.array(
                [{"bytes": b"x", "path": "a.png"}, {"bytes": None, "path": "b.png"}, None]
            ),
        }
    )
    first, second, third = ArrowRows(table, "t").take([0, 1, 2])
    assert first["series"].dtype == np.float32
    np.testing.assert_array_equal(first["series"], [1, np.nan, 3])
    assert len(second["series"]) == 0 and third["series"] is None
    np.testing.assert_array_equal(first["grid"], [[1, 2], [3, 4]])
    assert [row.tolist() for row in second["grid"]] == [[5.0], [6.0, 7.0]]
    np.testing.assert_array_equal(third["fixed"], [1, 2])
    assert (first["ints"], third["ints"]) == ([1, 2], None)
    assert [row["price"] for row in (first, second, third)] == [1.25, None, -3.5]
    assert first["day"] == datetime.date(2024, 1, 2) and third["kind"] == "a"
    assert [row["image"] for row in (first, second, third)] == [b"x", "b.png", None]


def test_taking_gives_the_rows_asked_for_in_that_order():
    source = ArrowRows(pa.table({"n": range(1000)}), "t")
    assert [row["n"] for row in source.take(np.array([5, 3, 999, 3]))] == [5, 3, 999, 3]
    assert source[-1] == {"n": 999} and source.where(4) == "t, row 5"
    assert source.take([]) == []
    with pytest.raises(IndexError):
        source[1000]


def test_empty_rows_and_huge_cells_are_left_out_in_memory_and_in_streams(tmp_path):
    huge = "x" * (10 * 2**20 + 1)
    table = pa.table({"n": [1, None, None, 4, 5], "t": ["a", None, huge, "d", None]})
    path = tmp_path / "rows.parquet"
    pq.write_table(table, path, row_group_size=2)
    source = read_parquet(path, 0.5)
    wanted = [{"n": 1, "t": "a"}, {"n": 4, "t": "d"}, {"n": 5, "t": None}]
    assert source.take(range(3)) == wanted
    assert source.where(1) == f"{path}, row 4"
    assert source.problems.first == [
        f"{path}, row 2: the row is empty",
        f"{path}, row 3: the cell 't' holds more than 10 MB",
    ]
    stream = stream_parquet(path, 0.5)
    for position in range(4):
        assert list(stream.read_from(position)) == wanted[position:]
    assert stream.count() == 3 and stream.where(2) == f"{path}, row 5"
    assert stream.problems.first == source.problems.first
    with pytest.raises(DataError, match="2 of 5 rows"):
        read_parquet(path)
    with pytest.raises(DataError, match="2 of 5 rows"):
        list(stream_parquet(path).read_from(0))


def test_a_deep_position_reads_one_row_group(tmp_path, monkeypatch):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"n": range(10_000)}), path, row_group_size=100)
    read = []
    original = pq.ParquetFile.read_row_group

    def counted(self, number, *args, **kwargs):
        read.append(number)
        return original(self, number, *args, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    assert next(stream_parquet(path).read_from(9_150)) == {"n": 9_150}
    assert read == [91]


@pytest.mark.parametrize("cut", [0, 10, -20])
def test_a_damaged_file_is_named(tmp_path, cut):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"n": range(100)}), path)
    path.write_bytes(path.read_bytes()[:cut])
    for opened in (read_parquet, stream_parquet):
        with pytest.raises(DataError, match=r"rows\.parquet is not a whole Parquet file"):
            opened(path)
    path.rename(tmp_path / "rows.arrow")
    with pytest.raises(DataError, match=r"rows\.arrow is not a whole Arrow file"):
        ArrowRows.open(tmp_path / "rows.arrow")


def test_an_arrow_stream_file_and_double_names(tmp_path):
    table = pa.table({"n": [1, 2]})
    with (
        pa.OSFile(str(tmp_path / "s.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as writer,
    ):
        writer.write_table(table)
    assert ArrowRows.open(tmp_path / "s.arrow").column("n") == [1, 2]
    twice = pa.table([[1], [2]], names=["a", "a"])
    with pytest.raises(DataError, match="column 'a' appears more than once"):
        ArrowRows.open(write_arrow(twice, tmp_path / "t.arrow"))


def test_broken_text_is_named_with_its_column(tmp_path):
    broken = pa.StringArray.from_buffers(
        1, pa.py_buffer(np.array([0, 1], np.int32)), pa.py_buffer(b"\xff")
    )
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"t": broken}), path)
    with pytest.raises(DataError, match="column 't' holds broken text"):
        read_parquet(path)
    with pytest.raises(DataError, match="column 't' holds broken text"):
        list(stream_parquet(path).read_from(0))
