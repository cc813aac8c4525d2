"""Corpora: the same documents from files, JSON lines and Parquet, by position."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from polytask.data.corpus import CorpusSpec, FileCorpus, open_corpus
from polytask.errors import ConfigError, DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("one\n\ntwo\nlines\n\n\nthree\n", encoding="utf-8")
    (tmp_path / "deep" / "b.md").write_bytes("\ufefffour ä\r\nfive".encode())
    (tmp_path / "blank.txt").write_text(" \n", encoding="utf-8")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "c.csv").write_text("not,text\n", encoding="utf-8")
    (tmp_path / ".hidden.txt").write_text("no", encoding="utf-8")
    return tmp_path


def test_files_paragraphs_and_lines(folder: Path) -> None:
    def read(documents: str) -> list[str]:
        spec = CorpusSpec.of({"path": str(folder), "documents": documents})
        return list(open_corpus(spec).read_from(0))

    assert read("file") == ["one\n\ntwo\nlines\n\n\nthree\n", "four ä\nfive"]
    assert read("paragraph") == ["one", "two\nlines", "three\n", "four ä\nfive"]
    assert read("line") == ["one", "two", "lines", "three", "four ä", "five"]


def test_a_position_is_a_document(folder: Path) -> None:
    corpus = open_corpus(CorpusSpec(path=str(folder), documents="line"))
    whole = list(corpus.read_from(0))
    for position in range(len(whole) + 2):
        assert list(corpus.read_from(position)) == whole[position:]
    assert corpus.where(2).endswith("a.txt, line 4")
    assert corpus.where(5).endswith("b.md, line 2")
    limited = open_corpus(CorpusSpec(path=str(folder), documents="line", limit=3))
    assert list(limited.read_from(1)) == ["two", "lines"]


def test_rows_of_json_lines_and_parquet(tmp_path: Path) -> None:
    texts = ["first", "", None, "second", "third"]
    lines = [json.dumps({"body": text, "id": i}) for i, text in enumerate(texts)]
    (tmp_path / "x.jsonl").write_text("\n".join(lines), encoding="utf-8")
    pq.write_table(pa.table({"body": texts}), tmp_path / "x.parquet")
    for name in ("x.jsonl", "x.parquet"):
        for streaming in (False, True):
            data = {"path": name, "streaming": streaming, "max_bad": 0.5}
            spec = CorpusSpec.of({"data": data, "column": "body"})
            corpus = open_corpus(spec, tmp_path)
            assert list(corpus.read_from(0)) == ["first", "second", "third"]
            assert list(corpus.read_from(2)) == ["third"]
            assert "row" in corpus.where(1) or "line" in corpus.where(1)


def test_short_forms(folder: Path) -> None:
    assert CorpusSpec.of("notes/").path == "notes/"
    assert CorpusSpec.of("notes.txt").path == "notes.txt"
    assert CorpusSpec.of("pages.jsonl").data == "pages.jsonl"
    assert CorpusSpec.of("pages.jsonl.gz").data == "pages.jsonl.gz"
    assert CorpusSpec.of("hub:a/b").data == "hub:a/b"
    assert isinstance(open_corpus(CorpusSpec.of(str(folder))), FileCorpus)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"path": "nothing"}, "there is no file"),
        ({"path": "tables"}, "holds no text files"),
        ({"data": "tables/t.csv", "column": "bdy"}, "Did you mean 'body'"),
        ({"data": "tables/t.csv", "column": "number"}, "holds int .*not text"),
        ({"path": "bad.txt"}, "not valid utf-8 at byte 3"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, spec: dict[str, str], words: str) -> None:
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "t.csv").write_text("body,number\na,1\n", encoding="utf-8")
    (tmp_path / "bad.txt").write_bytes(b"abc\xff\xfe")
    with pytest.raises(DataError, match=words):
        list(open_corpus(CorpusSpec.of(spec), tmp_path).read_from(0))


def test_one_source_is_given() -> None:
    with pytest.raises(ConfigError, match="exactly one of 'path'"):
        CorpusSpec.of({"path": "x", "data": "y"})
    with pytest.raises(ConfigError, match="is expected"):
        CorpusSpec.of(3)  # type: ignore[arg-type]
