"""Cells between text, Arrow and Python: which columns are numbers, and what a row holds.

A column of text is a number column when all its filled cells are numbers, but for a share that may
be bad; the exceptions are rows that failed. Cells with thousands separators, dates, or leading
zeros (postcodes, article numbers) are text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

MISSING = ("", "NA", "N/A", "NaN", "nan", "NULL", "null", "None", "none", "n/a", "na", "-")
"""Cells that stand for no number in a number column. In text columns they stay as they are."""

_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$|^[+-]?(inf|Inf|INF|infinity|Infinity)$"
_CODE = r"^[+-]?(0[0-9xX]|\d{20})"  # digits that name something: a number would alter them
_SAMPLE = 2000
_LIKELY = 0.5

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Column:
    """A converted column: its type, its cells, and which rows hold what they should not."""

    type: str  # 'text', 'int', 'float'
    cells: pa.ChunkedArray
    bad: Mask | None = None


def convert(text: pa.ChunkedArray, declared: str | None, tolerance: float) -> Column:
    """Cells of a text column as numbers if they are (or are declared to be) numbers."""
    if declared in ("text", "image"):
        return Column("text", text)
    if declared is None and not _looks_like_numbers(text):
        return Column("text", text)
    column = _fast(text, declared) or _careful(text, declared)
    if declared is None:
        bad = 0 if column.bad is None else int(column.bad.sum())
        if bad > tolerance * len(text) or _has_codes(text):
            return Column("text", text)
    return column


def _looks_like_numbers(text: pa.ChunkedArray) -> bool:
    """Whether about half of some filled cells, spread over the column, are numbers."""
    if len(text) == 0:
        return False
    places = np.unique(np.linspace(0, len(text) - 1, _SAMPLE).astype(np.int64))
    sample = pc.utf8_trim_whitespace(text.take(pa.array(places)))
    filled = sample.filter(pc.invert(pc.is_in(sample, pa.array(MISSING))))
    if len(filled) == 0:  # the sample met only empty cells
        sample = pc.utf8_trim_whitespace(text)
        filled = sample.filter(pc.invert(pc.is_in(sample, pa.array(MISSING))))
    if len(filled) == 0:
        return False
    numbers = pc.sum(pc.match_substring_regex(filled, _NUMBER)).as_py()
    return bool(numbers >= _LIKELY * len(filled))


def _has_codes(text: pa.ChunkedArray) -> bool:
    return bool(pc.any(pc.match_substring_regex(text, _CODE)).as_py())


def _fast(text: pa.ChunkedArray, declared: str | None) -> Column | None:
    """The whole column at once, when every cell is a number just so."""
    if declared != "float":
        try:
            return Column("int", pc.cast(text, pa.int64()))
        except pa.ArrowInvalid:
            if declared == "int":
                return None
    try:
        return Column("float", _nan_is_null(pc.cast(text, pa.float64())))
    except pa.ArrowInvalid:
        return None


def _careful(text: pa.ChunkedArray, declared: str | None) -> Column:
    """Spaces around numbers, missing markers and cells that are no numbers are sorted out."""
    trimmed = pc.utf8_trim_whitespace(text)
    missing = pc.is_in(trimmed, pa.array(MISSING))
    good = pc.match_substring_regex(trimmed, _NUMBER)
    bad = pc.invert(pc.or_(missing, good)).to_numpy()
    nothing = pa.scalar(None, pa.string())
    numbers = pc.if_else(good, pc.replace_substring_regex(trimmed, r"^\+", ""), nothing)
    values = pc.cast(numbers, pa.float64())
    if declared == "float":
        return Column("float", values, bad)
    try:
        return Column("int", pc.cast(numbers, pa.int64()), bad)
    except pa.ArrowInvalid:
        if declared is None:
            return Column("float", values, bad)
    known = values.to_numpy()
    whole = np.isnan(known) | ((np.abs(known) < 2.0**53) & (known == np.trunc(known)))
    bad = bad | ~whole
    ints = pa.array(np.where(whole & ~np.isnan(known), known, 0).astype(np.int64))
    return Column("int", pa.chunked_array([pc.if_else(pa.array(np.isnan(known)), None, ints)]), bad)


def _nan_is_null(values: pa.ChunkedArray) -> pa.ChunkedArray:
    if not pc.any(pc.is_nan(values)).as_py():
        return values
    return pc.if_else(pc.is_nan(values), pa.scalar(None, values.type), values)


def rows_of(table: pa.Table) -> list[dict[str, Any]]:
    """Rows as Python values: see `python_cells`."""
    names = table.column_names
    columns = [python_cells(column) for column in table.columns]
    if not columns:
        return [{} for _ in range(table.num_rows)]
    return [dict(zip(names, cells)) for cells in zip(*columns)]


def python_cells(cells: pa.ChunkedArray) -> list[Any]:
    """Python values of a column. Lists of floats become float arrays (nested ones matrices when
    their rows are equally long), decimals floats, encoded images bytes or a path."""
    kind = cells.type
    if pa.types.is_decimal(kind):
        cells = pc.cast(cells, pa.float64())
    elif _is_list(kind) and _holds_floats(kind):
        return [None if cell.values is None else _array(cell.values) for cell in cells]
    elif pa.types.is_struct(kind) and {kind.field(i).name for i in range(kind.num_fields)} == {
        "bytes",
        "path",
    }:
        return [_bytes_or_path(cell) for cell in cells.to_pylist()]
    values: list[Any] = cells.to_pylist()
    return values


def _is_list(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _holds_floats(kind: pa.DataType) -> bool:
    return bool(_holds_floats(kind.value_type) if _is_list(kind) else pa.types.is_floating(kind))


def _array(values: pa.Array) -> Any:
    if not _is_list(values.type):
        return values.to_numpy(zero_copy_only=False)
    inner = [None if cell.values is None else _array(cell.values) for cell in values]
    shapes = {getattr(item, "shape", None) for item in inner}
    if len(shapes) == 1 and None not in shapes:
        return np.stack([np.asarray(item) for item in inner])
    return inner


def _bytes_or_path(cell: dict[str, Any] | None) -> bytes | str | None:
    if cell is None:
        return None
    found: bytes | str | None = cell["bytes"] if cell["bytes"] is not None else cell["path"]
    return found
