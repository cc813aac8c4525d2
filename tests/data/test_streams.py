"""Streams: the same rows as in memory from any position, in little memory."""

import gzip
import itertools
import json
import logging
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polytask.data.concat import ConcatStream
from polytask.data.csvrows import read_csv, stream_csv
from polytask.data.delimited import Delimited
from polytask.data.jsonl import read_jsonl, stream_jsonl
from polytask.data.parquet import stream_parquet
from polytask.data.stream import StreamOf
from polytask.data.textfile import text_file
from polytask.errors import DataError

counter = itertools.count()
ours = settings(deadline=None, max_examples=40)
# What a line may be: usable or one of the faults. The number tells usable ones apart.
LINES = st.lists(st.sampled_from(["good", "good", "quoted", "short", "blank"]), max_size=40)


def csv_file(folder, kinds):
    forms = {"good": "{0},word{0}", "quoted": '{0},"two\nlines {0}"', "short": "{0}", "blank": ""}
    path = folder / f"{next(counter)}.csv"
    lines = [forms[kind].format(i) for i, kind in enumerate(kinds)]
    path.write_text("n,text\n" + "\n".join(lines) + "\n")
    return path


def jsonl_file(folder, kinds):
    forms = {
        "good": '{{"n": {0}}}',
        "quoted": '{{"n": {0}, "text": "a\\nb"}}',
        "short": "{{",
        "blank": "",
    }
    path = folder / f"{next(counter)}.jsonl"
    lines = [forms[kind].format(i) for i, kind in enumerate(kinds)]
    path.write_text("\n".join(['{"n": -1, "text": "x"}', *lines]) + "\n")
    return path


@ours
@given(LINES, st.integers(1, 400))
@pytest.mark.parametrize("kind", ["csv", "csv.gz", "jsonl"])
def test_a_stream_equals_the_rows_in_memory_from_every_position(
    tmp_path_factory, kind, kinds, block
):
    folder = tmp_path_factory.getbasetemp()
    if kind == "jsonl":
        file = text_file(jsonl_file(folder, kinds), None)
        whole, stream = read_jsonl(file, 0.99), stream_jsonl(file, 0.99, block)
    else:
        path = csv_file(folder, kinds)
        if kind == "csv.gz":
            packed = path.with_suffix(".csv.gz")
            packed.write_bytes(gzip.compress(path.read_bytes()))
            path = packed
        source = Delimited.open(path, types={"n": "int", "text": "text"})
        try:
            whole = read_csv(source, 0.99)
        except DataError:
            with pytest.raises(DataError):
                list(stream_csv(source, 0.99, block).read_from(0))
            return
        stream = stream_csv(source, 0.99, block)
    rows = whole.take(range(len(whole)))
    for position in (len(rows), 0, *range(len(rows))):  # also before the index is built
        assert list(stream.read_from(position)) == rows[position:]
    assert stream.count() == len(rows)
    assert [stream.where(i) for i in range(len(rows))] == [whole.where(i) for i in range(len(rows))]
    assert stream.problems.bad == whole.problems.bad
    assert stream.problems.first == whole.problems.first


def test_blocks_smaller_than_a_line_count_each_bad_row_once(tmp_path):
    source = Delimited.open(csv_file(tmp_path, ["blank", "good", "good", "short"]))
    stream = stream_csv(source, 0.99, block=1)
    for position in (0, 1, 2):
        list(stream.read_from(position))
    assert stream.problems.bad == 2 and stream.count() == 2


def test_a_fresh_stream_starts_in_the_middle(tmp_path):
    path = csv_file(tmp_path, ["good", "quoted"] * 500)
    source = Delimited.open(path)
    rows = list(stream_csv(source, block=200).read_from(0))
    assert list(stream_csv(source, block=200).read_from(700)) == rows[700:]


def test_two_readers_of_one_stream_do_not_disturb_each_other(tmp_path):
    stream = stream_csv(Delimited.open(csv_file(tmp_path, ["good"] * 300)), block=100)
    pairs = list(zip(stream.read_from(0), stream.read_from(0)))
    assert len(pairs) == 300 and all(a == b for a, b in pairs)
    assert [row["n"] for row in stream.read_from(295)] == [295, 296, 297, 298, 299]


def test_a_known_position_is_reached_by_one_block(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("n\n" + "".join(f"{i}\n" for i in range(50_000)))
    stream = stream_csv(Delimited.open(path), block=1000)
    assert stream.count() == 50_000
    blocks = []
    original = stream._reader.chunks

    class Watched:
        def chunks(self, mark):
            for chunk in original(mark):
                blocks.append(chunk)
                yield chunk

    stream._reader = Watched()
    assert next(stream.read_from(49_000)) == {"n": 49_000}
    assert len(blocks) == 1


def test_too_many_bad_rows_stop_a_stream_early_and_few_are_logged(tmp_path, caplog):
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n" + "1,2\n" * 3000 + "1\n" * 5 + "1,2\n" * 3000)
    with caplog.at_level(logging.WARNING, "polytask.data"):
        assert sum(1 for _ in stream_csv(Delimited.open(path), 0.01, 1000).read_from(0)) == 6000
    assert "5 of 6,005 rows" in caplog.text and "line 3002" in caplog.text
    path.write_text("a,b\n" + "1,2\n" * 3000 + "1\n" * 500 + "1,2\n" * 300_000)
    seen = 0
    with pytest.raises(DataError, match=r"more than max_bad = 0.01"):
        for _ in stream_csv(Delimited.open(path), 0.01, 1000).read_from(0):
            seen += 1
    assert seen < 4000


def test_bad_rows_are_logged_once_however_often_they_are_read(tmp_path, caplog):
    stream = stream_csv(Delimited.open(csv_file(tmp_path, ["good"] * 20 + ["short"])), 0.2, 30)
    with caplog.at_level(logging.WARNING, "polytask.data"):
        for _ in range(3):
            list(stream.read_from(0))
    assert len(caplog.records) == 1 and stream.problems.bad == 1


def test_streams_joined_equal_their_rows_joined(tmp_path):
    parts = [csv_file(tmp_path, ["good"] * n) for n in (7, 1, 12)]
    streams = [stream_csv(Delimited.open(part), block=20) for part in parts]
    joined = ConcatStream(streams, "all")
    rows = [row for stream in streams for row in stream.read_from(0)]
    for position in range(22):
        assert list(joined.read_from(position)) == rows[position:]
    assert joined.count() == 20
    assert joined.where(7) == f"{parts[1]}, line 2" and joined.where(9) == f"{parts[2]}, line 3"
    with pytest.raises(IndexError):
        joined.where(20)


def test_rows_in_memory_can_be_read_in_order(tmp_path):
    whole = read_csv(Delimited.open(csv_file(tmp_path, ["good"] * 600)))
    stream = StreamOf(whole)
    for position in (0, 255, 256, 599, 600, 700):
        assert list(stream.read_from(position)) == whole.take(range(position, 600))
    assert stream.count() == 600 and stream.where(3) == whole.where(3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_stream_needs_little_memory_whatever_the_file_holds(tmp_path, kind):
    rows, words = 60_000, "some words that make the row long enough to count " * 15
    path = tmp_path / f"big.{kind}"
    if kind == "csv":
        path.write_text("n,text\n" + "".join(f"{i},{words}\n" for i in range(rows)))
    elif kind == "jsonl":
        line = json.dumps({"n": 1, "text": words})
        path.write_text((line + "\n") * rows)
    else:
        table = pa.table({"n": range(rows), "text": [words + str(i) for i in range(rows)]})
        pq.write_table(table, path, row_group_size=10_000, compression="none", use_dictionary=False)
        del table
    assert path.stat().st_size > 40_000_000
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    openers = {
        "csv": lambda: stream_csv(Delimited.open(path)),
        "jsonl": lambda: stream_jsonl(text_file(path, None)),
        "parquet": lambda: stream_parquet(path),
    }
    stream = openers[kind]()
    arrow = seen = 0
    for seen, _ in enumerate(stream.read_from(0), 1):
        if seen % 1000 == 0:
            arrow = max(arrow, pa.total_allocated_bytes() - before)
    python = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seen == rows
    assert python < 16_000_000 and arrow < 16_000_000
