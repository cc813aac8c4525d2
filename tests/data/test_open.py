"""What a DataSpec opens, and what it says when there is nothing to open."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import polytask.data
from polytask.data import DataSpec, MemoryRows, RowProblems, RowSource, StreamSource, View
from polytask.data.columns import column, require_columns
from polytask.data.open import open_rows, open_splits
from polytask.errors import ConfigError, DataError

ROWS = [{"n": i, "text": f"some text {i}", "x": i / 4} for i in range(10)]


def write_all(folder):
    lines = "".join(f"{r['n']},{r['text']},{r['x']}\n" for r in ROWS)
    (folder / "rows.csv").write_text("n,text,x\n" + lines)
    (folder / "rows.tsv").write_text("n\ttext\tx\n" + lines.replace(",", "\t"))
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (folder / "rows.json").write_text(json.dumps(ROWS))
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, folder / "rows.parquet")
    with (
        pa.OSFile(str(folder / "rows.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, table.schema) as writer,
    ):
        writer.write_table(table)


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "json", "parquet", "arrow"])
def test_every_format_gives_the_same_rows(tmp_path, ending):
    write_all(tmp_path)
    source = open_rows(DataSpec.of(f"rows.{ending}"), tmp_path)
    assert isinstance(source, RowSource) and source.columns == ("n", "text", "x")
    assert source.take(range(10)) == ROWS and source[3] == ROWS[3]
    assert column(source, "x") == [r["x"] for r in ROWS]
    assert f"rows.{ending}" in source.where(2) and source.name == f"rows.{ending}"
    if ending != "json":
        stream = open_rows(DataSpec.of({"path": f"rows.{ending}", "streaming": True}), tmp_path)
        assert isinstance(stream, StreamSource) and not isinstance(stream, RowSource)
        assert list(stream.read_from(4)) == ROWS[4:] and stream.columns == source.columns


def test_the_format_can_be_said_for_a_name_that_does_not_tell(tmp_path):
    (tmp_path / "data.txt").write_text("a;b\n1;2\n")
    with pytest.raises(DataError, match=r"format of .*data\.txt cannot be told from its name"):
        open_rows(DataSpec.of("data.txt"), tmp_path)
    assert open_rows(DataSpec.of({"path": "data.txt", "format": "csv"}), tmp_path)[0] == {
        "a": 1,
        "b": 2,
    }


def test_a_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "reviews.csv").write_text("a\n1\n")
    with pytest.raises(DataError, match=r"no file .*review\.csv\. Did you mean 'reviews\.csv'"):
        open_rows(DataSpec.of("review.csv"), tmp_path)
    with pytest.raises(DataError, match=r"no file .*zebra\. .* has: reviews\.csv"):
        open_rows(DataSpec.of("zebra"), tmp_path)
    (tmp_path / "datasets").mkdir()
    with pytest.raises(DataError, match=r"no folder .*dataset\. Did you mean '.*datasets'"):
        open_rows(DataSpec.of("dataset/x.csv"), tmp_path)
    with pytest.raises(DataError, match=r"no folder .*qqq/www"):
        open_rows(DataSpec.of("qqq/www/x.csv"), tmp_path)
    with pytest.raises(DataError, match="no file matches"):
        open_rows(DataSpec.of("*.parquet"), tmp_path)
    with pytest.raises(DataError, match="has no data that can be read"):
        open_rows(DataSpec.of("datasets"), tmp_path)


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet", "arrow"])
def test_an_empty_file_is_named(tmp_path, ending):
    (tmp_path / f"rows.{ending}").touch()
    with pytest.raises(DataError, match=rf"rows\.{ending} is empty"):
        open_rows(DataSpec.of(f"rows.{ending}"), tmp_path)


def test_files_named_by_split_are_splits_and_shards_are_joined(tmp_path):
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    for name, first, stop in (
        ("train-00000-of-00002", 0, 4),
        ("train-00001-of-00002", 4, 7),
        ("validation-00000-of-00001", 7, 9),
        ("rows_test", 9, 10),
    ):
        pq.write_table(pa.Table.from_pylist(ROWS[first:stop]), folder / f"{name}.parquet")
    splits = open_splits(DataSpec.of("set"), tmp_path)
    assert {name: len(source) for name, source in splits.items()} == {
        "train": 7, "valid": 2, "test": 1,
    }  # fmt: skip
    train = splits["train"]
    assert train.take([6, 0, 3, 4]) == [ROWS[i] for i in (6, 0, 3, 4)] and train[-1] == ROWS[6]
    assert column(train, "n") == list(range(7))
    assert train.where(5).endswith("train-00001-of-00002.parquet, row 2")
    assert len(open_rows(DataSpec.of({"path": "set", "split": "validation"}), tmp_path)) == 2
    stream = open_rows(DataSpec.of({"path": "set", "split": "train", "streaming": True}), tmp_path)
    for position in range(8):
        assert list(stream.read_from(position)) == ROWS[position:7]
    with pytest.raises(IndexError):
        train[7]


def test_a_pattern_joins_files_of_equal_columns(tmp_path):
    (tmp_path / "a.csv").write_text("n,x\n1,2\n")
    (tmp_path / "b.csv").write_text("x,n\n4,3\n")
    assert open_rows(DataSpec.of("*.csv"), tmp_path).take([1, 0]) == [
        {"n": 3, "x": 4},
        {"n": 1, "x": 2},
    ]
    (tmp_path / "c.csv").write_text("n,y\n1,2\n")
    with pytest.raises(DataError, match=r"a\.csv and c\.csv have different columns \(x, y only in"):
        open_rows(DataSpec.of("*.csv"), tmp_path)


def test_keys_that_a_json_file_lacks_are_none(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"n": 1, "x": 2}')
    (tmp_path / "b.jsonl").write_text('{"n": 3, "y": 4}')
    source = open_rows(DataSpec.of("*.jsonl"), tmp_path)
    assert source.take([1, 0]) == [{"n": 3, "x": None, "y": 4}, {"n": 1, "x": 2, "y": None}]
    assert column(source, "y") == [None, 4]


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "json", "parquet", "arrow"])
def test_sources_in_memory_can_be_sent_to_another_process(tmp_path, ending):
    write_all(tmp_path)
    source = open_rows(DataSpec.of(f"rows.{ending}"), tmp_path)
    assert source[1] == ROWS[1]
    again = pickle.loads(pickle.dumps(source))
    assert again.take(range(10)) == ROWS and again.where(3) == source.where(3)


@pytest.mark.parametrize(
    ("spec", "option"),
    [
        ({"path": "rows.parquet", "separator": ";"}, "separator"),
        ({"path": "rows.jsonl", "types": {"n": "text"}}, "types"),
        ({"path": "rows.arrow", "encoding": "latin-1"}, "encoding"),
        ({"path": "rows.jsonl", "quote": ""}, "quote"),
        ({"hub": "a/b", "columns": ["x"]}, "columns"),
        ({"embedded": "digits", "encoding": "utf-8"}, "encoding"),
    ],
)
def test_an_option_without_effect_is_refused(tmp_path, spec, option):
    write_all(tmp_path)
    with pytest.raises(ConfigError, match=f"the option '{option}' has no effect"):
        open_rows(DataSpec.of(spec), tmp_path)


def test_a_declared_image_column_must_exist(tmp_path):
    write_all(tmp_path)
    with pytest.raises(DataError, match=r"column 'img' is missing in rows\.jsonl"):
        open_rows(DataSpec.of({"path": "rows.jsonl", "types": {"img": "image"}}), tmp_path)


def test_embedded_sets_come_by_name_and_split(monkeypatch, tmp_path):
    from polytask.data import embedded

    parts = {"train": MemoryRows(ROWS[:7]), "test": MemoryRows(ROWS[7:])}
    monkeypatch.setattr(embedded, "load", lambda name: parts if name == "rows" else {})
    assert open_splits(DataSpec.of("embedded:rows"), tmp_path) == parts
    spec = DataSpec.of({"embedded": "rows", "split": "test"})
    assert open_rows(spec, tmp_path).take([0]) == [ROWS[7]]
    stream = open_rows(DataSpec.of({"embedded": "rows", "split": "train", "streaming": True}), None)
    assert list(stream.read_from(5)) == ROWS[5:7]
    series = {"embedded": "rows", "split": "train", "series": {"time": "n", "values": ["x"]}}
    assert open_rows(DataSpec.of(series), tmp_path)[0]["series"].shape == (7, 1)
    with pytest.raises(DataError, match="embedded:rows has the splits train, test; say which"):
        open_rows(DataSpec.of("embedded:rows"), tmp_path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "give exactly one of path, hub, embedded"),
        ({"path": "a", "hub": "b"}, "give exactly one of path, hub, embedded, not path and hub"),
        ({"pth": "a.csv"}, "unknown key 'pth'. Did you mean 'path'"),
        ({"path": "a", "format": "xlsx"}, "key 'format' = 'xlsx'"),
        ({"path": "a", "encoding": "utf-9"}, "unknown encoding"),
        ({"path": "a", "max_bad": 1.5}, "max_bad"),
        ({"path": "a", "separator": ";;"}, "separator"),
        ({"path": "a", "separator": '"'}, "separator and quote must differ"),
        ({"path": "a", "separator": "é"}, "must be ASCII"),
        ({"path": "a", "series": {"time": "t", "values": []}}, "values"),
        ({"path": "a", "streaming": True, "series": {"time": "t", "values": ["v"]}}, "stream"),
        ("", "data should be a path"),
        (3, "data should be a path"),
    ],
)
def test_a_wrong_spec_is_explained(value, message):
    with pytest.raises(ConfigError, match=f"task 'a': .*{message}"):
        DataSpec.of(value, "task 'a': data")


def test_short_forms_of_a_spec():
    assert DataSpec.of("a.csv") == DataSpec(path="a.csv")
    assert (
        DataSpec.of("hub:o/n") == DataSpec(hub="o/n") and DataSpec.of("hub:o/n").name == "hub:o/n"
    )
    assert DataSpec.of("embedded:digits").name == "embedded:digits"
    assert DataSpec.of(DataSpec(path="x")) == DataSpec.of({"path": "x"})
    assert DataSpec.of("C:data.csv").path == "C:data.csv"


def test_missing_columns_name_what_there_is_and_the_nearest():
    source = MemoryRows([{"text": "a", "lable": 1}], "reviews.csv")
    require_columns(source, ["text", "lable"])
    with pytest.raises(DataError) as caught:
        require_columns(source, ["label"], "task 'reviews'")
    assert str(caught.value) == (
        "task 'reviews': column 'label' is missing in reviews.csv (has: text, lable). "
        "Did you mean 'lable'?"
    )
    with pytest.raises(DataError, match="columns 'labl', 'q' are missing"):
        require_columns(source, ["labl", "q"])


def test_a_column_of_any_source_is_its_cells():
    source = MemoryRows(ROWS, "x")
    assert column(source, "n") == list(range(10))
    assert column(View(source, [9, 2]), "n") == [9, 2]
    assert column(View(View(source, np.array([5, 6, 7])), [2, 0]), "n") == [7, 5]


def test_problems_are_counted_by_rows_and_merged():
    problems = RowProblems("x", 0.5)
    problems.add("line 1", "bad", 3)
    other = RowProblems("x", 0.5)
    for line in range(4):
        other.add(f"line {line}", "worse")
    problems.merge(other)
    assert problems.bad == 7
    assert problems.first == ["line 1: bad", "line 0: worse", "line 1: worse"]
    problems.check(7)
    with pytest.raises(DataError, match="7 of 13 rows"):
        problems.check(6)


def test_importing_the_package_is_light_and_every_public_name_is_there():
    code = (
        "import sys, polytask.data; heavy = {'pyarrow', 'pandas', 'torch', 'datasets', 'numpy', "
        "'PIL'} & set(sys.modules); assert not heavy, heavy; "
        "missing = [n for n in polytask.data.__all__ if not hasattr(polytask.data, n)]; "
        "assert not missing, missing; "
        "assert not {'torch', 'datasets', 'pandas'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert callable(polytask.data.propose) and "open_rows" in dir(polytask.data)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        polytask.data.nothing  # noqa: B018
