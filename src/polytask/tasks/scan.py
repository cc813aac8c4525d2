"""One pass over a group's rows: inputs checked, labels collected, content hashed.

Everything that could stop a training run later is found here, once per row and not once per task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from polytask.data.rows import Row, RowSource
from polytask.tasks.arrays import feature_values, image_pixels, series_values
from polytask.tasks.fit import chunks
from polytask.tasks.hashing import Hashes, content_hashes
from polytask.tasks.plan import Draft
from polytask.tasks.schemas import is_missing, words_of
from polytask.tasks.sequences import candidates_of
from polytask.tasks.task import Field

IMAGES_DECODED = 5_000  # of a source, evenly spread; further ones are decoded when used


@dataclass
class Scan:
    """What one source's rows hold. `labels[k]` are the raw labels of the group's task k, for
    multiple choice as (label, candidates)."""

    source: RowSource
    labels: list[list[Any]]
    bad: dict[int, str] = field(default_factory=dict)  # row -> reason
    hashes: Hashes = field(default_factory=lambda: np.zeros(0, np.uint64))
    by: list[Any] = field(default_factory=list)  # cells of the split's column

    def __len__(self) -> int:
        return len(self.source)


def scan(drafts: Sequence[Draft], source: RowSource) -> Scan:
    """Read every row of a source once for all tasks of a group."""
    first = drafts[0]
    columns = sorted({column for f in first.fields for column in f.columns})
    result = Scan(source, [[] for _ in drafts])
    checks = [_check(f, first.config.max_cell, len(source)) for f in first.fields]
    readers = [_label_reader(draft) for draft in drafts]
    by, hashes = first.config.split.by, []
    for start, rows in chunks(source):
        hashes.append(content_hashes(rows, columns))
        for offset, row in enumerate(rows):
            reason = _input_fault(row, columns, checks, start + offset)
            for k, read in enumerate(readers):
                try:
                    result.labels[k].append(read(row))
                except ValueError as error:
                    reason = reason or str(error)
                    result.labels[k].append(None)
            if reason:
                result.bad[start + offset] = reason
        if by is not None:
            result.by += [row.get(by) for row in rows]
    result.hashes = np.concatenate([np.zeros(0, np.uint64), *hashes])
    return result


Check = Callable[[Row, int], str | None]


def _input_fault(
    row: Row, columns: Sequence[str], checks: Sequence[Check], number: int
) -> str | None:
    if all(is_missing(row.get(column)) for column in columns):
        names = ", ".join(f"'{c}'" for c in columns[:5])
        return f"the input is empty (column {names})"
    return next((fault for check in checks if (fault := check(row, number))), None)


def _check(f: Field, max_cell: int, size: int) -> Check:
    """A function that finds what is wrong with a row's cells of one field."""
    if f.modality == "text":
        return lambda row, _: _text_fault(row, f, max_cell)
    if f.modality == "image":
        every = max(1, -(-size // IMAGES_DECODED))
        return lambda row, number: _image_fault(row[f.columns[0]], number % every == 0)
    if f.modality == "series":
        return lambda row, _: _fault(series_values, row, f.columns)
    if f.modality == "features":
        return lambda row, _: _fault(feature_values, row, f.columns[0])
    return lambda row, _: None


def _fault(read: Callable[..., Any], *values: Any) -> str | None:
    try:
        read(*values)
    except ValueError as error:
        return str(error)
    return None


def _text_fault(row: Row, f: Field, max_cell: int) -> str | None:
    if f.slot == "choices":
        return _fault(candidates_of, row, f)
    for column in f.columns:
        cell = row[column]
        if isinstance(cell, str):
            if len(cell) > max_cell:
                return (
                    f"the cell in column '{column}' holds {len(cell) / 1e6:.3g} million "
                    f"characters; max_cell is {max_cell:,}"
                )
        elif isinstance(cell, bytes | dict):
            return f"the cell in column '{column}' is no text but a {type(cell).__name__}"
    return None


def _image_fault(cell: Any, decode: bool) -> str | None:
    if isinstance(cell, str | Path) and not decode:
        return None if Path(cell).is_file() else f"image {cell} does not exist"
    return _fault(image_pixels, cell, 8) if decode else None


def _label_reader(draft: Draft) -> Callable[[Row], Any]:
    """A function that takes a row's raw label, None where it has none."""
    columns = draft.label_columns
    if not columns:
        return lambda row: None
    if draft.kind == "choice":
        options = next(f for f in draft.fields if f.slot == "choices")
        return lambda row: _with_candidates(row, columns[0], options)
    if draft.kind == "tagging":
        text = next(f for f in draft.fields if f.modality == "text").columns[0]
        return lambda row: _tags(row, columns[0], text)
    if len(columns) == 1:
        return lambda row: None if is_missing(row[columns[0]]) else row[columns[0]]

    def several(row: Row) -> Any:
        values = [row[column] for column in columns]
        if all(is_missing(value) for value in values):
            return None
        return list(zip(*values)) if draft.kind == "forecasting" else values

    return several


def _with_candidates(row: Row, column: str, options: Field) -> Any:
    return None if is_missing(row[column]) else (row[column], candidates_of(row, options))


def _tags(row: Row, column: str, text: str) -> Any:
    if is_missing(row[column]):
        return None
    tags, words = words_of(row[column]), words_of(row[text])
    if len(tags) != len(words):
        raise ValueError(f"there are {len(tags)} tags for {len(words)} words")
    return tags
