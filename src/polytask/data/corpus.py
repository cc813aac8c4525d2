"""Text to pretrain on, as a stream of documents: folders of text files, JSONL, Parquet, the hub.

    corpus: notes/                                   every .txt, .md, .rst, .text below the folder
    corpus: {path: notes, documents: paragraph}      split at blank lines
    corpus: {data: pages.jsonl, column: body}        anything `data:` can name, read in order
    corpus: {data: "hub:owner/name", column: text}

Nothing is held: files are read one after the other, rows in slices. A position is the number of
documents before it, and the same position means the same document, whoever reads it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field, model_validator

from polytask.configs import Config, parse
from polytask.data.columns import require_columns
from polytask.data.open import missing_file, open_rows
from polytask.data.rows import Row, RowSource
from polytask.data.spec import DataSpec
from polytask.data.stream import StreamOf
from polytask.data.textfile import plain_suffix, text_file
from polytask.errors import ConfigError, DataError

TEXT_ENDINGS = (".txt", ".text", ".md", ".rst")
Documents = Literal["file", "paragraph", "line"]
_BLANK = re.compile(r"\n[ \t]*\n+")


class CorpusSpec(Config):
    """Where documents come from: exactly one of `path` (text files) and `data` (rows)."""

    path: str | None = None
    """A text file, or a folder with text files; relative paths start at the configuration."""
    data: str | dict[str, Any] | None = None
    """Rows, in any form that a task's `data:` takes."""
    column: str = "text"
    """The column of `data` with the text."""
    documents: Documents = "file"
    """What is one document of a text file: all of it, a paragraph, or a line."""
    endings: tuple[str, ...] = TEXT_ENDINGS
    """File endings that are text."""
    encoding: str | None = None
    """UTF-8, or what the byte-order mark says, when None."""
    limit: int | None = Field(default=None, ge=1)
    """At most this many documents."""

    @model_validator(mode="after")
    def _one_source(self) -> CorpusSpec:
        if (self.path is None) is (self.data is None):
            raise ValueError("give exactly one of 'path' (text files) and 'data' (rows)")
        return self

    @classmethod
    def of(cls, value: str | Mapping[str, Any] | CorpusSpec, where: str = "corpus") -> CorpusSpec:
        """From a mapping, or in short: a text file or folder, or rows ('pages.jsonl', 'hub:ID',
        'embedded:NAME')."""
        if isinstance(value, CorpusSpec):
            return value
        if isinstance(value, Mapping):
            return parse(cls, value, where)
        if not isinstance(value, str) or not value.strip():
            raise ConfigError(f"{where}: a path, 'hub:ID' or a mapping is expected, not {value!r}")
        ending = plain_suffix(Path(value))
        rows = value.partition(":")[0] in ("hub", "embedded") or (
            ending and ending not in TEXT_ENDINGS
        )
        return parse(cls, {"data" if rows else "path": value}, where)


class TextCorpus(Protocol):
    """Documents in order."""

    @property
    def name(self) -> str: ...
    def read_from(self, position: int) -> Iterator[str]:
        """Documents from `position` on; blank ones are left out and have no position."""

    def where(self, position: int) -> str:
        """Where a document stands, for people."""


def open_corpus(spec: CorpusSpec, base: Path = Path()) -> TextCorpus:
    """The corpus; `DataError` for a path that is not there, a folder without text, or rows
    without the column."""
    if spec.data is not None:
        source = open_rows(DataSpec.of(spec.data, "corpus"), base)
        require_columns(source, [spec.column], "corpus: column")
        rows = StreamOf(source) if isinstance(source, RowSource) else source
        return RowCorpus(rows, spec.column, spec.limit)
    assert spec.path is not None
    path = (base / Path(spec.path).expanduser()).absolute()
    if path.is_file():
        files: tuple[Path, ...] = (path,)
    elif path.is_dir():
        files = tuple(
            file
            for file in sorted(path.rglob("*"))
            if plain_suffix(file) in spec.endings
            and file.is_file()
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        )
        if not files:
            raise DataError(
                f"{path} holds no text files (endings: {', '.join(spec.endings)}). For tables and "
                "JSON lines say data: instead of path:, and column:"
            )
    else:
        raise missing_file(path)
    return FileCorpus(spec.path, files, spec.documents, spec.encoding, spec.limit)


@dataclass(frozen=True)
class FileCorpus:
    """Documents of text files, in the order of their paths."""

    name: str
    files: tuple[Path, ...]
    documents: Documents = "file"
    encoding: str | None = None
    limit: int | None = None

    def read_from(self, position: int) -> Iterator[str]:
        for number, (_, _, text) in enumerate(self._all()):
            if self.limit is not None and number >= self.limit:
                return
            if number >= position:
                yield text

    def where(self, position: int) -> str:
        for number, (file, line, _) in enumerate(self._all()):
            if number == position:
                return f"{file}, line {line}"
        return f"{self.name}, document {position + 1}"

    def _all(self) -> Iterator[tuple[Path, int, str]]:
        """(file, line, text) of every document that is not blank."""
        for file in self.files:
            if file.stat().st_size == 0:
                continue
            for line, text in self._parts(_read(file, self.encoding)):
                if text.strip():
                    yield file, line, text

    def _parts(self, text: str) -> Iterator[tuple[int, str]]:
        if self.documents == "file":
            yield 1, text
            return
        pattern = _BLANK if self.documents == "paragraph" else re.compile("\n")
        start, line = 0, 1
        for match in [*pattern.finditer(text), None]:
            stop = len(text) if match is None else match.start()
            yield line, text[start:stop]
            if match is not None:
                line += text.count("\n", start, match.end())
                start = match.end()


@dataclass(frozen=True)
class RowCorpus:
    """One document a row: the text of one column."""

    rows: Any  # StreamSource
    column: str
    limit: int | None = None

    @property
    def name(self) -> str:
        return str(self.rows.name)

    def read_from(self, position: int) -> Iterator[str]:
        number = 0
        for index, row in enumerate(self.rows.read_from(0)):
            if self.limit is not None and number >= self.limit:
                return
            text = self._text(row, index)
            if text.strip():
                if number >= position:
                    yield text
                number += 1

    def where(self, position: int) -> str:
        number = 0
        for index, row in enumerate(self.rows.read_from(0)):
            if self._text(row, index).strip():
                if number == position:
                    return str(self.rows.where(index))
                number += 1
        return f"{self.name}, document {position + 1}"

    def _text(self, row: Row, index: int) -> str:
        value = row[self.column]
        if value is None:
            return ""
        if not isinstance(value, str):
            raise DataError(
                f"{self.rows.where(index)}: the column '{self.column}' holds "
                f"{type(value).__name__} ({str(value)[:40]!r}), not text"
            )
        return value


def _read(file: Path, encoding: str | None) -> str:
    source = text_file(file, encoding)
    parts = []
    with source.open() as reader:
        while block := reader.read(1 << 20):
            parts.append(block)
    try:
        return b"".join(parts).decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not valid {source.encoding} at byte {error.start}; name the right one with "
            "encoding:, for instance latin-1"
        ) from error
