"""A text file as UTF-8 bytes: compression, byte-order marks, encodings and old line ends undone.

Offsets count UTF-8 bytes. A plain UTF-8 file is sought directly; a compressed or transcoded one is
read again from its start up to the offset, which needs no memory.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, cast

from polytask.errors import DataError

COMPRESSED: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
}
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_STEP = 1 << 20


class ByteReader(Protocol):
    """What block reading needs of a file."""

    def read(self, size: int, /) -> bytes: ...


def plain_suffix(path: Path) -> str:
    """The lower-case ending that tells the format: '.csv' for 'x.CSV.gz'."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


@dataclass(frozen=True)
class TextFile:
    """How to read one text file; made by `text_file`."""

    path: Path
    encoding: str
    start: int  # bytes of the byte-order mark, to be passed over (plain files)
    old_line_ends: bool  # lines end in a lone carriage return

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def plain(self) -> bool:
        """Whether the bytes on disk are what readers see, so that the file can be mapped."""
        return self.seekable and not self.old_line_ends

    @property
    def seekable(self) -> bool:
        return self.encoding == "utf-8" and self.path.suffix.lower() not in COMPRESSED

    @contextmanager
    def open(self, offset: int = 0) -> Iterator[ByteReader]:
        """A reader that begins `offset` bytes after the first character."""
        with readable(self.path), _open(self.path) as raw:
            raw.read(self.start)
            reader: ByteReader = raw
            if self.encoding != "utf-8":
                reader = _Transcoder(self.path, raw, self.encoding)
            if self.old_line_ends:
                reader = _OldLineEnds(reader)
            if self.seekable:
                raw.seek(self.start + offset)
            else:
                _pass_over(reader, offset)
            yield reader


def text_file(path: Path, encoding: str | None) -> TextFile:
    """Look at the first bytes; `DataError` for an empty or unreadable file."""
    with readable(path), _open(path) as raw:
        head = raw.read(_STEP)
    if not head:
        raise DataError(f"{path} is empty")
    mark, found = next(((m, name) for m, name in _MARKS if head.startswith(m)), (b"", "utf-8"))
    name = found if encoding is None else codecs.lookup(encoding).name
    name = "utf-8" if name in ("utf-8-sig", "ascii") else name
    start = len(mark) if name == "utf-8" and found == "utf-8" else 0
    if len(head) == start:
        raise DataError(f"{path} is empty")
    return TextFile(path, name, start, b"\r" in head and b"\n" not in head)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Name the file when it cannot be read, or is a broken compressed file."""
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is damaged or not complete: {error}") from error
    except (PermissionError, IsADirectoryError, FileNotFoundError) as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _open(path: Path) -> IO[bytes]:
    opener = COMPRESSED.get(path.suffix.lower())
    return path.open("rb") if opener is None else cast("IO[bytes]", opener(path, "rb"))


def _pass_over(reader: ByteReader, count: int) -> None:
    while count > 0 and (chunk := reader.read(min(count, _STEP))):
        count -= len(chunk)


class _OldLineEnds:
    def __init__(self, inner: ByteReader) -> None:
        self._inner = inner

    def read(self, size: int, /) -> bytes:
        return self._inner.read(size).replace(b"\r", b"\n")


class _Transcoder:
    """Reads another encoding as UTF-8. Bytes that are wrong in an encoding that extends ASCII stay
    as they are, so that row validation meets and names them; UTF-16 and UTF-32 have no such rows.
    """

    def __init__(self, path: Path, raw: IO[bytes], encoding: str) -> None:
        self._path, self._raw, self._encoding = path, raw, encoding
        wide = encoding.startswith(("utf-16", "utf-32"))
        self._decoder = codecs.getincrementaldecoder(encoding)(
            "strict" if wide else "surrogateescape"
        )
        self._ready = b""
        self._finished = False

    def read(self, size: int, /) -> bytes:
        while len(self._ready) < size and not self._finished:
            chunk = self._raw.read(max(size, 4096))
            self._finished = not chunk
            try:
                text = self._decoder.decode(chunk, final=self._finished)
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{self._path} is not {self._encoding}: {error.reason}; "
                    "name the right one with 'encoding:'"
                ) from error
            self._ready += text.encode("utf-8", "surrogateescape")
        taken, self._ready = self._ready[:size], self._ready[size:]
        return taken
