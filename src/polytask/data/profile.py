"""What the columns of a table are, judged by their cells: the ground for proposing tasks."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from polytask.data.columns import column
from polytask.data.rows import RowSource
from polytask.data.series import parse_times
from polytask.errors import DataError

Kind = Literal[
    "text", "class", "number", "time", "image", "series", "tags", "flag", "id", "constant", "empty"
]

MOST_CLASSES = 50
_MOST_CODES = 10
_ROWS_PER_CLASS = 4
_TIME_NAME = re.compile(r"^(time|date|datetime|timestamp|day|month|year|ds|ts|hour|week)$", re.I)
_ID_NAME = re.compile(r"^(.*_)?(id|ids|uuid|guid|index|idx|key|no|nr)$|^.*[a-z]Id$", re.I)
_TAG_BREAK = re.compile(r"\s*[,;|]\s*")
_LOOK = 2000


@dataclass(frozen=True)
class Profile:
    """One column: what it is and the figures that say so."""

    name: str
    kind: Kind
    rows: int
    filled: int
    distinct: int
    words: float = 0.0  # words a cell, for text
    whole: bool = False  # a number column of integers

    @property
    def counted(self) -> str:
        """'has 3 distinct values in 1,204 rows'."""
        gaps = f", {self.rows - self.filled:,} of them empty" if self.filled < self.rows else ""
        plural = "s" * (self.distinct != 1)
        return f"has {self.distinct:,} distinct value{plural} in {self.rows:,} rows{gaps}"

    @cached_property
    def named_as_id(self) -> bool:
        return _ID_NAME.match(self.name) is not None


def profile(source: RowSource) -> list[Profile]:
    """A profile of every column."""
    images = getattr(source, "images", ())
    return [_profile(name, column(source, name), name in images) for name in source.columns]


def _profile(name: str, cells: list[Any], image: bool) -> Profile:
    present = [cell for cell in cells if not _missing(cell)]
    rows, filled = len(cells), len(present)
    if not present:
        return Profile(name, "empty", rows, 0, 0)
    if image or isinstance(present[0], bytes):
        return Profile(name, "image", rows, filled, filled)
    if isinstance(present[0], list | tuple | np.ndarray):
        return _profile_lists(name, present, rows)
    distinct = len({str(cell) for cell in present})
    if distinct == 1:
        return Profile(name, "constant", rows, filled, 1)
    if all(isinstance(cell, int | float) and not isinstance(cell, bool) for cell in present):
        return _profile_numbers(name, present, rows, distinct)
    texts = [str(cell) for cell in present]
    words = float(np.mean([len(text.split()) for text in texts[:_LOOK]]))
    kind = _kind_of_text(name, texts, distinct, words)
    return Profile(name, kind, rows, filled, distinct, words)


def _missing(cell: Any) -> bool:
    return (
        cell is None
        or (isinstance(cell, str) and not cell.strip())
        or (isinstance(cell, float) and math.isnan(cell))
    )


def _profile_lists(name: str, present: Sequence[Any], rows: int) -> Profile:
    lengths = float(np.mean([len(cell) for cell in present]))
    first = next((cell[0] for cell in present if len(cell)), None)
    if isinstance(first, str):
        tags = {item for cell in present for item in cell}
        kind: Kind = "tags" if len(tags) <= max(MOST_CLASSES, len(present) // 4) else "text"
        return Profile(name, kind, rows, len(present), len(tags), lengths)
    pixels = isinstance(present[0], np.ndarray) and present[0].dtype == np.uint8
    return Profile(name, "image" if pixels else "series", rows, len(present), 0, lengths)


def _profile_numbers(name: str, present: Sequence[Any], rows: int, distinct: int) -> Profile:
    filled = len(present)
    whole = all(isinstance(cell, int) or float(cell).is_integer() for cell in present)

    def made(kind: Kind) -> Profile:
        return Profile(name, kind, rows, filled, distinct, whole=whole)

    if whole and _TIME_NAME.match(name):
        return made("time")
    if whole and distinct == filled and (_ID_NAME.match(name) or _counts_up(present)):
        return made("id")
    if whole and set(present) <= {0, 1}:
        return made("flag")
    if whole and distinct <= _MOST_CODES and filled >= _ROWS_PER_CLASS * distinct:
        return made("class")
    if whole and _ID_NAME.match(name):
        return made("id")
    return made("number")


def _counts_up(present: Sequence[Any]) -> bool:
    return len(present) > 2 and all(later - earlier == 1 for earlier, later in pairwise(present))


def _kind_of_text(name: str, texts: Sequence[str], distinct: int, words: float) -> Kind:
    filled = len(texts)
    if _is_time(texts):
        return "time"
    few = distinct <= max(2, min(MOST_CLASSES, filled // _ROWS_PER_CLASS))
    if _is_tags(texts, distinct, words):
        return "tags"
    if few and not (_ID_NAME.match(name) and distinct > _MOST_CODES):
        return "class"
    if words < 1.5 and (distinct > filled / 2 or _ID_NAME.match(name)):
        return "id"
    if words < 2.5 and distinct <= filled / 2:
        return "class" if distinct <= MOST_CLASSES * 4 else "id"
    return "text"


def _is_time(texts: Sequence[str]) -> bool:
    sample = texts[:: max(len(texts) // 200, 1)]
    try:
        moments = parse_times(sample, "")
    except DataError:  # times, but day and month cannot be told apart
        return True
    return sum(moment is not None for moment in moments) >= 0.95 * len(sample)


def _is_tags(texts: Sequence[str], distinct: int, words: float) -> bool:
    """Cells such as 'red; round', made of few words that come in many combinations."""
    sample = [_TAG_BREAK.split(text.strip()) for text in texts[:_LOOK]]
    several = sum(len(tags) > 1 for tags in sample)
    tags = {tag for cell in sample for tag in cell}
    short = max(len(tag.split()) for tag in tags) <= 3
    few = len(tags) <= min(MOST_CLASSES, max(2, len(sample) // _ROWS_PER_CLASS))
    return several >= 0.2 * len(sample) and short and few and distinct > len(tags) / 2


def series_key(source: RowSource, time: Profile, columns: Sequence[Profile]) -> str | bool | None:
    """The column that names the series a moment belongs to; None when every moment occurs once;
    False when neither holds, so that the table is no collection of series."""
    moments = column(source, time.name)
    if _unique(moments):
        return None
    for other in columns:
        if other.kind in ("class", "id", "flag") and other.name != time.name:
            cells = column(source, other.name)
            if other.distinct <= len(cells) / 8 and _unique(list(zip(cells, moments))):
                return other.name
    return False


def _unique(values: list[Any]) -> bool:
    return len(set(values)) >= math.ceil(0.99 * len(values))


def typical_period(source: RowSource, time: Profile) -> int | None:
    """Steps of the season that the spacing of moments suggests: 24 hours, 7 days, 12 months ..."""
    moments = parse_times(column(source, time.name)[:_LOOK], f"column '{time.name}'")
    known = sorted({moment for moment in moments if moment is not None})
    if len(known) < 3:
        return None
    step = float(np.median(np.diff(known)))
    days = step / 86_400
    for low, high, period in (
        (0.04, 0.043, 24),
        (0.9, 1.1, 7),
        (6.5, 7.5, 52),
        (27, 32, 12),
        (88, 93, 4),
    ):
        if low <= days <= high:
            return period
    return None
