"""JSONL: cells stay what JSON says, unusable lines are named."""

import gzip
import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polytask.data.jsonl import read_jsonl, stream_jsonl
from polytask.data.textfile import text_file
from polytask.errors import DataError

counter = itertools.count()
ours = settings(deadline=None, max_examples=40)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
CELL = st.recursive(
    TEXT | st.integers() | st.floats(allow_nan=False) | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
ROW = st.dictionaries(st.sampled_from("abcd"), CELL, min_size=1)


def write(folder: Path, data: str | bytes, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def read(path: Path, max_bad: float = 0.01, block: int = 1 << 20, encoding: str | None = None):
    return read_jsonl(text_file(path, encoding), max_bad, block)


def holds_something(row: dict) -> bool:
    return any(cell not in ("", None) for cell in row.values())


@ours
@given(st.lists(ROW.filter(holds_something), min_size=1), st.booleans(), st.integers(1, 80))
def test_what_json_writes_is_read_back(tmp_path_factory, table, ascii_only, block):
    text = "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in table)
    path = write(tmp_path_factory.getbasetemp(), text, f"{next(counter)}.jsonl")
    source = read(path, block=block)
    keys = list(dict.fromkeys(key for row in table for key in row))
    assert source.columns == tuple(keys)
    assert source.take(range(len(source))) == [{k: row.get(k) for k in keys} for row in table]
    assert [source.where(i) for i in range(len(source))] == [
        f"{path}, line {i + 1}" for i in range(len(table))
    ]
    assert source.column(keys[0]) == [row.get(keys[0]) for row in table]


def test_every_fault_is_named_with_its_line(tmp_path):
    lines = [
        b'{"a": 1}',
        b'{"a": 1,}',
        b"",
        b"[1, 2]",
        b"7",
        b'{"a": "\xff"}',
        b'{"a": 1, "a": 2}',
        b"{}",
        b'{"a": null, "b": ""}',
        b'{"a": "\\ud800"}',
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a": ' + b"1" * 5000 + b"}",
        b'{"a": "' + b"x" * (10 * 2**20 + 1) + b'"}',
        b'{"a": 2}',
    ]
    path = write(tmp_path, b"\n".join(lines))
    chunks = stream_jsonl(text_file(path, None), 0.99)._reader.chunks(None)
    problems = [problem for chunk in chunks for problem in chunk.problems()]
    reasons = {int(where.split("line ")[1]): why for where, why, _ in problems}
    starts = {
        2: "it is not JSON",
        3: "the row is empty",
        4: "it is a list, not an object",
        5: "it is a number, not an object",
        6: "it is not UTF-8",
        7: "it is not usable JSON: the key 'a' is given twice",
        8: "the row is empty",
        9: "the row is empty",
        10: "it holds half of a surrogate pair",
        11: "it is not usable JSON",
        12: "it is not usable JSON",
        13: "the cell 'a' holds more than 10 MB",
    }
    assert reasons.keys() == starts.keys()
    for line, start in starts.items():
        assert reasons[line].startswith(start)
    source = read(path, max_bad=0.99)
    assert source.take([0, 1]) == [{"a": 1}, {"a": 2}]
    assert source.where(1) == f"{path}, line 14"
    with pytest.raises(DataError, match="12 of 14 rows"):
        read(path)


def test_lines_that_are_json_only_together_are_not_rows(tmp_path):
    lines = ['{"a": 1}', '{"a": 2},{"a": 3}', '{"c": [{"d": 4}', "{}]}"]
    assert len(json.loads("[" + ",".join(lines) + "]")) == len(lines)  # as many, and others
    source = read(write(tmp_path, "\n".join(lines)), max_bad=0.99)
    assert source.column("a") == [1] and source.problems.bad == 3


def test_mixed_types_in_a_column_stay_what_they_are(tmp_path):
    path = write(tmp_path, '{"v": 1}\n{"v": "one"}\n{"v": [1, "x"]}\n{"v": {"k": true}}\n')
    assert read(path).column("v") == [1, "one", [1, "x"], {"k": True}]


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1", "utf-8-sig"])
def test_other_encodings_marks_and_line_ends_are_read(tmp_path, encoding):
    path = write(tmp_path, '{"a": "é"}\r\n{"a": "ü"}\r\n\r\n'.encode(encoding))
    assert read(path, encoding=encoding).column("a") == ["é", "ü"]


def test_a_compressed_file_reads_the_same(tmp_path):
    text = "".join(json.dumps({"n": i}) + "\n" for i in range(500)).encode()
    source = read(write(tmp_path, gzip.compress(text), "rows.jsonl.gz"), block=300)
    assert source.column("n") == list(range(500))
    assert source.take([499, 3]) == [{"n": 499}, {"n": 3}]


def test_a_json_array_is_read_item_by_item(tmp_path):
    items = [{"a": 1}, {"a": 2, "b": [1]}, 5]
    path = write(tmp_path, json.dumps(items, indent=2), "rows.json")
    source = read(path, max_bad=0.5)
    assert source.take([1, 0]) == [{"a": 2, "b": [1]}, {"a": 1, "b": None}]
    assert source.where(1) == f"{path}, item 2"
    assert source.problems.first == [
        f"{path}, item 3: it is a number, not an object with named cells"
    ]
    with pytest.raises(DataError, match="is one JSON array, which cannot be read in order"):
        stream_jsonl(text_file(path, None))
    with pytest.raises(DataError, match="is not JSON"):
        read(write(tmp_path, "[{", "broken.json"))


def test_an_empty_file_is_an_error(tmp_path):
    with pytest.raises(DataError, match="is empty"):
        read(write(tmp_path, b""))
