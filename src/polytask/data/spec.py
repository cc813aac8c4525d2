"""`DataSpec`: which rows, said in a few words of YAML.

data: reviews.csv
data: hub:stanfordnlp/imdb
data: embedded:digits
data: {path: photos, label_column: species}
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from polytask.configs import Config, parse
from polytask.errors import ConfigError

Format = Literal["csv", "tsv", "jsonl", "parquet", "arrow", "images"]
CellType = Literal["text", "int", "float", "image"]


class SeriesSpec(Config):
    """Turns a table with one row per moment into one row per series (or per window of it).

    The rows made have 'series' (length, channels) float32 with NaN where a cell is empty, 'time'
    (the last moment of the row, ISO text or number), 'start', and the `by` column if there is one.
    """

    time: str
    """Column with dates, timestamps or numbers; rows are sorted by it."""
    values: tuple[str, ...] = Field(min_length=1)
    """Number columns: the channels."""
    by: str | None = None
    """Column that names the series a row belongs to; None: the file is one series."""
    window: int | None = Field(default=None, ge=2)
    """Length of each row made; None: the whole series is one row."""
    stride: int | None = Field(default=None, ge=1)
    """Moments between the ends of two windows; None: the window's length."""


class DataSpec(Config):
    """Where rows come from and how to read them. Exactly one of path, hub, embedded is given."""

    path: str | None = None
    """File, folder, or pattern with '*'; relative paths start at the configuration's folder."""
    hub: str | None = None
    """Hugging Face data set id 'owner/name', or 'owner/name/configuration'."""
    embedded: str | None = None
    """Name of a data set that ships inside a package; `polytask data list` shows them."""
    format: Format | None = None
    """Guessed from the name's ending or the folder's content when None."""
    split: str | None = None
    """Split of a hub or embedded set, or 'train', 'valid', 'test' among a folder's files."""
    streaming: bool = False
    """Read in order without holding the rows: for what does not fit in memory."""
    max_bad: float = Field(default=0.01, ge=0, lt=1)
    """Share of rows that may fail validation; they are reported and left out. Above it: stop."""
    separator: str | None = Field(default=None, min_length=1, max_length=1)
    """Between cells of a CSV; guessed among , ; tab | when None."""
    quote: str = Field(default='"', max_length=1)
    """Quote character of a CSV; '' when quotes are ordinary characters."""
    encoding: str | None = None
    """UTF-8, or what the byte-order mark says, when None."""
    columns: tuple[str, ...] = ()
    """Column names for a CSV without a header line."""
    types: Mapping[str, CellType] = Field(default_factory=dict)
    """Types of columns that should not be guessed."""
    label_column: str = "label"
    """Name of the column with the class in a folder with one sub-folder per class."""
    table: str | None = None
    """File inside an image folder with one row per image and a column with its path."""
    image_column: str | None = None
    """Column of `table` with the path; found by looking for file names when None."""
    check_images: Literal["decode", "header"] = "decode"
    """Before training, decode every image, or only read its header (for very large folders)."""
    series: SeriesSpec | None = None
    """Make rows of series from a table with one row per moment."""

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                codecs.lookup(value)
            except LookupError:
                raise ValueError("unknown encoding; try utf-8, utf-16, latin-1, cp1252") from None
        return value

    @model_validator(mode="after")
    def _one_source(self) -> DataSpec:
        given = [name for name in ("path", "hub", "embedded") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                "give exactly one of path, hub, embedded"
                + (f", not {' and '.join(given)}" if given else "")
            )
        if self.separator is not None and self.separator == self.quote:
            raise ValueError("separator and quote must differ")
        if not (self.quote + (self.separator or "")).isascii():
            raise ValueError("separator and quote must be ASCII characters")
        if self.series is not None and self.streaming:
            raise ValueError("series cannot be made from a stream; leave streaming out")
        return self

    @property
    def name(self) -> str:
        """What to call the rows in messages."""
        if self.path is not None:
            return self.path
        return f"hub:{self.hub}" if self.hub is not None else f"embedded:{self.embedded}"

    @classmethod
    def of(cls, value: str | Mapping[str, Any] | DataSpec, where: str = "data") -> DataSpec:
        """From the short form ('reviews.csv', 'hub:ID', 'embedded:NAME') or a mapping."""
        if isinstance(value, DataSpec):
            return value
        if isinstance(value, Mapping):
            return parse(cls, value, where)
        if not isinstance(value, str) or not value.strip():
            raise ConfigError(
                f"{where}: data should be a path, 'hub:ID', 'embedded:NAME' or a mapping, "
                f"not {value!r}"
            )
        kind, colon, rest = value.partition(":")
        if colon and kind in ("hub", "embedded"):
            return parse(cls, {kind: rest.strip()}, where)
        return parse(cls, {"path": value}, where)
