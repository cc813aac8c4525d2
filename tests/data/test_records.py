"""Blocks of records: where records end, and on which line they stand."""

import csv
import io
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polytask.data.records import LINES, Dialect, _record_ends, read_blocks, walk
from polytask.data.textfile import text_file
from polytask.errors import DataError

PIECES = st.lists(st.sampled_from(['"', '""', ",", "\n", "\r\n", "a", "é", " "]), max_size=30)
counter = itertools.count()
ours = settings(deadline=None, max_examples=80)


def write(folder: Path, data: bytes) -> Path:
    path = folder / f"{next(counter)}.csv"
    path.write_bytes(data)
    return path


def ends_by_hand(data: bytes) -> list[int]:
    """A state machine, one byte after the other."""
    ends, state = [], "start"
    for place, byte in enumerate(data):
        sign = chr(byte)
        if state == "quoted":
            state = "closed" if sign == '"' else "quoted"
        elif sign == "\n":
            ends.append(place)
            state = "start"
        elif sign == ",":
            state = "start"
        elif sign == '"' and state in ("start", "closed"):
            state = "quoted"
        else:
            state = "plain"
    return ends


@ours
@given(PIECES)
def test_record_ends_equal_a_state_machine(pieces):
    data = "".join(pieces).encode() + b"\n"
    assert _record_ends(data, Dialect()).tolist() == ends_by_hand(data)
    assert [end for _, end in walk(data, Dialect())] == ends_by_hand(data)


@ours
@given(st.lists(st.lists(st.text(st.sampled_from('a"\n,é'), max_size=5), min_size=2, max_size=3)))
def test_records_of_a_well_written_file_are_its_rows(rows):
    out = io.StringIO(newline="")
    csv.writer(out, lineterminator="\n").writerows(rows)
    assert len(_record_ends(out.getvalue().encode(), Dialect())) == len(rows)


@ours
@given(PIECES, st.integers(1, 40))
def test_blocks_of_any_size_hold_the_same_records(tmp_path_factory, pieces, size):
    data = "".join(pieces).encode()
    path = write(tmp_path_factory.getbasetemp(), data or b"x")
    file = text_file(path, None)
    if file.old_line_ends:
        data = data.replace(b"\r", b"\n")

    def records(block_size):
        found = []
        for block in read_blocks(file, Dialect(), block_size):
            for i in range(len(block)):
                start = block.offset + int(block.starts[i])
                text = block.data[block.starts[i] : block.ends[i]]
                found.append((start, block.line_of(i), text, block.unclosed))
        return found

    assert records(size) == records(1 << 20)
    for start, line, text, _ in records(size):
        if data:
            assert data[start : start + len(text)] == text
            assert line == 1 + data.count(b"\n", 0, start)


def test_reading_from_a_blocks_offset_gives_the_blocks_that_followed(tmp_path):
    path = write(tmp_path, b"".join(b'%d,"a\nb"\n' % i for i in range(200)))
    blocks = list(read_blocks(text_file(path, None), Dialect(), 100))
    assert len(blocks) > 5
    assert blocks[3].line == 1 + 2 * sum(len(b) for b in blocks[:3])


@ours
@given(st.lists(st.integers(0, 9), min_size=3), st.integers(1, 12))
def test_where_a_block_ends_depends_on_where_it_begins_only(tmp_path_factory, widths, size):
    data = "\n".join("a" * width for width in widths) + "b"
    file = text_file(write(tmp_path_factory.getbasetemp(), data.encode()), None)
    blocks = list(read_blocks(file, Dialect(), size))
    for number, block in enumerate(blocks):  # small blocks: records and blank runs span several
        again = read_blocks(file, Dialect(), size, block.offset, block.line)
        assert [b.data for b in again] == [b.data for b in blocks[number:]]


def test_blank_lines_at_the_end_are_no_records(tmp_path):
    path = write(tmp_path, b"a\n\nb\n" + b"\r\n\n" * 50)
    for size in (1, 3, 7, 1000):
        records = [len(block) for block in read_blocks(text_file(path, None), LINES, size)]
        assert sum(records) == 3


def test_an_unclosed_quote_is_one_unclosed_block(tmp_path):
    path = write(tmp_path, b'a,b\n1,"x\n2,3\n4,5\n')
    *whole, last = read_blocks(text_file(path, None), Dialect(), 4)
    assert [block.unclosed for block in whole] == [False] * len(whole)
    assert last.unclosed and last.line == 2 and last.lines == 3


def test_a_record_without_end_is_refused_with_its_line(tmp_path, monkeypatch):
    monkeypatch.setattr("polytask.data.records.MAX_RECORD", 1000)
    path = write(tmp_path, b'a,b\n1,"' + b"x" * 5000 + b'"\n')
    with pytest.raises(DataError, match="line 2: a row of more than"):
        list(read_blocks(text_file(path, None), Dialect(), 100))


def test_records_at_names_each_record_once(tmp_path):
    path = write(tmp_path, b"aa\nbb\ncc\n")
    (block,) = read_blocks(text_file(path, None), LINES, 100)
    assert block.records_at(np.array([0, 1, 6, 7])).tolist() == [0, 2]
