"""CSV and TSV: what is read, what is refused, and where it stands."""

import csv
import gzip
import io
import itertools
import logging
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from polytask.data.csvrows import read_csv, stream_csv
from polytask.data.delimited import Delimited
from polytask.errors import DataError

counter = itertools.count()
ours = settings(deadline=None, max_examples=80)


def write(folder: Path, data: str | bytes, name: str = "rows.csv") -> Path:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def read(path: Path, max_bad: float = 0.01, block: int = 1 << 24, **options):
    return read_csv(Delimited.open(path, **options), max_bad, block)


def rows(source) -> list[dict]:
    return source.take(range(len(source)))


def problems(path: Path, **options) -> list[str]:
    """All problems of a file, as 'line N: reason'."""
    source = Delimited.open(path, **options)
    found = []
    for block in source.blocks(1 << 20):
        parsed = source.parse(block)
        found += [f"{parsed.place(path, p)}: {p.reason}" for p in parsed.problems]
    return [text.removeprefix(f"{path}, ") for text in found]


TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8)
NUMBER = st.floats(allow_nan=False, allow_infinity=False, width=64)
ROW = st.tuples(TEXT, st.integers(-(2**63), 2**63 - 1) | st.none(), NUMBER | st.none(), TEXT)
NAMES = ("a", "count", "size", "b c")


@ours
@given(st.lists(ROW, min_size=1, max_size=20), st.sampled_from(",\t;|"), st.integers(1, 60))
@example([("\r", 1, 1.0, "")], ",", 1)
def test_what_csv_writes_is_read_back(tmp_path_factory, table, separator, block):
    table = [row for row in table if any(cell not in ("", None) for cell in row)]
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=separator)
    writer.writerow(NAMES)
    writer.writerows(table)
    path = write(tmp_path_factory.getbasetemp(), out.getvalue(), f"{next(counter)}.csv")
    types = {"a": "text", "b c": "text", "count": "int", "size": "float"}
    source = read(path, block=block, types=types, separator=separator)
    assert rows(source) == [dict(zip(NAMES, row)) for row in table]
    assert source.columns == NAMES and len(source) == len(table)


@ours
@given(
    st.lists(st.sampled_from(['"', ",", "\n", "\r", "\r\n", "a", "1", "\0", "é", ""]), max_size=40),
    st.integers(1, 50),
)
def test_any_text_gives_the_same_rows_and_faults_for_any_block_size(
    tmp_path_factory, pieces, block
):
    path = write(tmp_path_factory.getbasetemp(), "x,y\n" + "".join(pieces), f"{next(counter)}.csv")

    def outcome(size):
        try:
            source = read(path, max_bad=0.99, block=size)
        except DataError as error:
            return str(error)
        places = [source.where(i) for i in range(len(source))]
        return rows(source), places, source.problems.bad, source.problems.first

    assert outcome(block) == outcome(1 << 20)


def test_where_is_the_physical_line_also_behind_quoted_line_ends(tmp_path):
    path = write(tmp_path, 'id,text\n1,"a\nb\nc"\n2,plain\n3,"d\r\ne"\n4,end\n')
    for block in (1, 10, 1000):
        source = read(path, block=block)
        assert [source.where(i) for i in range(4)] == [f"{path}, line {n}" for n in (2, 5, 6, 8)]


def test_every_fault_is_named_with_its_line(tmp_path):
    path = write(
        tmp_path,
        b'a,b\n1,2\n"x\ny",2\n3\n\n5,6,7\nla\xffst,1\nq\rq,1\nn\0,1\n,\nlast,9\n"open,1\n2,3\n',
    )
    assert problems(path) == [
        "line 5: 1 cell instead of 2",
        "line 6: the row is empty",
        "line 7: 3 cells instead of 2",
        "line 8: it is not UTF-8 (name the encoding with 'encoding:')",
        "line 9: a carriage return stands inside an unquoted cell",
        "line 10: it holds a NUL byte",
        "line 11: the row is empty",
        "lines 13-14: a quote is opened here and never closed (is the file whole? if quotes are "
        "ordinary characters in it, say quote: '')",
    ]
    source = read(path, max_bad=0.9)
    assert rows(source) == [{"a": "1", "b": 2}, {"a": "x\ny", "b": 2}, {"a": "last", "b": 9}]
    assert source.problems.bad == 9
    assert [source.where(i) for i in range(3)] == [f"{path}, line {n}" for n in (2, 3, 12)]


def test_a_cell_of_ten_megabytes_is_refused(tmp_path):
    path = write(tmp_path, "a,b\n1,x\n2," + "y" * (10 * 2**20 + 1) + "\n3,z\n")
    assert problems(path) == ["line 3: the cell 'b' holds more than 10 MB"]
    assert [row["a"] for row in rows(read(path, max_bad=0.5))] == [1, 3]


def test_bad_rows_above_the_stated_share_stop_and_below_it_are_logged(tmp_path, caplog):
    good = "".join(f"{i},x\n" for i in range(199))
    path = write(tmp_path, "a,b\n" + good + "1,2,3\n")
    with caplog.at_level(logging.WARNING, "polytask.data"):
        source = read(path, max_bad=0.005)
    assert len(source) == 199 and source.problems.bad == 1
    assert "1 of 200 rows (0.5 %)" in caplog.text and "line 201: 3 cells" in caplog.text
    with pytest.raises(DataError, match=r"1 of 200 rows .*\n.*line 201.*more than max_bad = 0.004"):
        read(path, max_bad=0.004)


def test_only_the_first_three_faults_are_shown(tmp_path):
    path = write(tmp_path, "a,b\n" + "1\n" * 10)
    with pytest.raises(DataError) as caught:
        read(path)
    assert "10 of 10 rows" in str(caught.value)
    assert [f"line {n}:" in str(caught.value) for n in (2, 3, 4, 5)] == [True, True, True, False]


def test_a_cell_that_is_no_number_is_a_bad_row_of_a_number_column(tmp_path):
    lines = [f"t{i},{i}" for i in range(300)]
    lines[7] = "t7,many"
    path = write(tmp_path, "name,n\n" + "\n".join(lines) + "\n")
    source = read(path)
    assert source.problems.first == [
        f"{path}, line 9: 'many' in column 'n' is not an integer "
        "(say types: {n: text} if the column is text)"
    ]
    assert len(source) == 299 and source[7]["n"] == 8 and source.where(7) == f"{path}, line 10"
    assert read(path, types={"n": "text"})[7]["n"] == "many"


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["1", "2", ""], [1, 2, None]),
        (["1", "2.5", "NA"], [1.0, 2.5, None]),
        ([" 1", "2 ", "+3"], [1, 2, 3]),
        (["1e3", "-.5", "inf"], [1000.0, -0.5, float("inf")]),
        (["1,000", "2,500", "3"], ["1,000", "2,500", "3"]),
        (["007", "123", "045"], ["007", "123", "045"]),
        (["0x1F", "1", "2"], ["0x1F", "1", "2"]),
        (["1", "two", "3"], ["1", "two", "3"]),
        (["NA", "", "nan"], ["NA", "", "nan"]),
        (["2024-01-01", "2024-01-02", ""], ["2024-01-01", "2024-01-02", ""]),
        (["123456789012345678901", "1", "2"], ["123456789012345678901", "1", "2"]),
        (["9223372036854775807", "-9223372036854775808", "0"], [2**63 - 1, -(2**63), 0]),
        (["0", "-0.5", "0.25"], [0.0, -0.5, 0.25]),
        (["true", "false", "true"], ["true", "false", "true"]),
    ],
)
def test_a_column_is_numbers_only_when_all_filled_cells_are(tmp_path, cells, expected):
    out = io.StringIO()
    csv.writer(out).writerows([("k", "v"), *((f"k{i}", cell) for i, cell in enumerate(cells))])
    assert read(write(tmp_path, out.getvalue())).column("v") == expected


def test_declared_types_are_kept_to(tmp_path):
    path = write(tmp_path, "a,b,c\n1,2,3\n4,5,6.5\n7.0,8,9\n")
    source = read(path, max_bad=0.5, types={"a": "float", "b": "text", "c": "int"})
    assert rows(source) == [{"a": 1.0, "b": "2", "c": 3}, {"a": 7.0, "b": "8", "c": 9}]
    assert "'6.5' in column 'c' is not an integer" in source.problems.first[0]
    with pytest.raises(DataError, match="a column 'd' that the file has not"):
        read(path, types={"d": "int"})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"\n\n\r\n", "has only blank lines"),
        (b"a,b,a\n1,2,3\n", "column 'a' appears more than once in the header"),
        (b"1,2,3\n4,5,6\n", "looks like data, not like a header"),
        (b"5.1,3.5,setosa\n4.9,3.0,setosa\n", "looks like data, not like a header"),
        (b"a,,c\n1,2,3\n", "column 2 has no name"),
        (b"a\0,b\n1,2\n", "header holds NUL bytes"),
        (b"a\xff,b\n1,2\n", "header is not UTF-8"),
        (b'"a,b\n1,2\n', "line 1: a quote is opened and never closed"),
    ],
)
def test_a_missing_or_ambiguous_header_is_named(tmp_path, data, message):
    with pytest.raises(DataError, match=message):
        read(write(tmp_path, data))


def test_an_unnamed_first_column_is_the_index_that_pandas_writes(tmp_path):
    assert read(write(tmp_path, ",a\n0,x\n1,y\n")).columns == ("index", "a")


def test_column_names_can_be_given_for_a_file_without_header(tmp_path):
    source = read(write(tmp_path, "\n1,x\n2,y\n"), columns=("n", "t"))
    assert rows(source) == [{"n": 1, "t": "x"}, {"n": 2, "t": "y"}]
    assert source.where(0).endswith("line 2")


def test_a_header_alone_gives_no_rows(tmp_path):
    assert len(read(write(tmp_path, "a,b\n"))) == 0


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_byte_order_marks_and_line_ends_make_no_difference(tmp_path, line_end, mark):
    data = mark + line_end.join(["text,n", "héllo,1", '"x, ""y""",2', ""])
    source = read(write(tmp_path, data))
    assert rows(source) == [{"text": "héllo", "n": 1}, {"text": 'x, "y"', "n": 2}]
    assert source.where(1).endswith("line 3")


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16", "utf-32", "utf-8-sig"])
def test_other_encodings_are_read(tmp_path, encoding):
    text = "text,n\n" + "".join(f"é{i},{i}\n" for i in range(500))
    path = write(tmp_path, text.encode(encoding))
    source = read(path, encoding=encoding, block=100)
    assert source[3] == {"text": "é3", "n": 3} and len(source) == 500
    assert source.where(499).endswith("line 501")
    stream = stream_csv(Delimited.open(path, encoding=encoding), block=100)
    assert list(stream.read_from(400)) == rows(source)[400:]


def test_utf16_is_known_by_its_mark_and_a_latin_file_is_explained(tmp_path):
    assert read(write(tmp_path, "a,b\né,1\n".encode("utf-16")))[0] == {"a": "é", "b": 1}
    with pytest.raises(DataError, match="name the encoding with 'encoding:'"):
        read(write(tmp_path, "a,b\né,1\n".encode("latin-1")))


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_the_separator_is_found(tmp_path, separator):
    path = write(tmp_path, f'a{separator}b\n1{separator}x\n2{separator}"p,q;r|s\tt"\n')
    assert rows(read(path))[1] == {"a": 2, "b": "p,q;r|s\tt"}


def test_a_single_column_needs_no_separator(tmp_path):
    path = write(tmp_path, 'text\nhello world\n"a, b"\n')
    assert read(path).column("text") == ["hello world", "a, b"]


def test_quotes_can_be_ordinary_characters(tmp_path):
    path = write(tmp_path, 'a\tb\n"open\t1\n5" screen\t2\n')
    assert read(path, quote="").column("a") == ['"open', '5" screen']


def test_stray_quotes_inside_cells_are_kept(tmp_path):
    path = write(tmp_path, 'a,b\n5" pipe,1\nx"y"z,2\n"q\n,""r""",3\n')
    assert read(path).column("a") == ['5" pipe', 'x"y"z', 'q\n,"r"']
    assert read(path).where(2).endswith("line 4")


def test_compressed_files_read_the_same_and_truncated_ones_are_refused(tmp_path):
    data = b"a,b\n" + b"".join(b"%d,x%d\n" % (i, i) for i in range(1000))
    packed = gzip.compress(data)
    whole = write(tmp_path, packed, "rows.csv.gz")
    source = read(whole, block=500)
    assert rows(source) == rows(read(write(tmp_path, data)))
    assert source.where(999) == f"{whole}, line 1001"
    broken = write(tmp_path, packed[: len(packed) // 2], "half.csv.gz")
    with pytest.raises(DataError, match=r"half.csv.gz is damaged or not complete"):
        read(broken)
    with pytest.raises(DataError, match="is damaged or not complete"):
        read(write(tmp_path, data, "plain.csv.gz"))


def test_indices_count_from_the_end_and_beyond_the_end_is_an_error(tmp_path):
    source = read(write(tmp_path, "a\n1\n2\n3\n"))
    assert source[-1] == {"a": 3}
    assert [row["a"] for row in source.take([2, 0, 2])] == [3, 1, 3]
    with pytest.raises(IndexError):
        source[3]


@pytest.mark.slow
def test_a_million_rows_are_read_in_seconds_and_taken_in_microseconds(tmp_path):
    path = tmp_path / "big.csv"
    block = "".join(f'{i},"some words, {i}",{i / 7:.6f},{"abc"[i % 3]}\n' for i in range(10_000))
    path.write_text("id,text,x,label\n" + block * 100)
    start = time.perf_counter()
    source = read(path)
    assert time.perf_counter() - start < 10  # about 1.2 s on two idle cores
    assert len(source) == 1_000_000
    picks = np.random.default_rng(0).integers(0, 1_000_000, (200, 32))
    start = time.perf_counter()
    for pick in picks:
        source.take(pick)
    assert (time.perf_counter() - start) / 200 < 1e-3  # about 50 microseconds
