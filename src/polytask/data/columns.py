"""Columns of row sources: are they there, and what is in one of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from polytask.data.rows import RowSource, StreamSource, View
from polytask.errors import DataError, nearest

_STEP = 4096


def require_columns(
    source: RowSource | StreamSource, names: Iterable[str], what: str = "data"
) -> None:
    """`DataError` that names each missing column, what there is, and the nearest.

    >>> from polytask.data.rows import MemoryRows
    >>> require_columns(MemoryRows([{"text": "a", "lable": 1}], "x.csv"), ["label"], "task 'a'")
    Traceback (most recent call last):
    ...
    polytask.errors.DataError: task 'a': column 'label' is missing in x.csv (has: text, lable). \
Did you mean 'lable'?
    """
    missing = [name for name in dict.fromkeys(names) if name not in source.columns]
    if not missing:
        return
    listed = ", ".join(f"'{name}'" for name in missing)
    has = ", ".join(source.columns[:30]) + (", ..." if len(source.columns) > 30 else "")
    near = [found for name in missing if (found := nearest(name, source.columns))]
    hint = f" Did you mean {' and '.join(repr(name) for name in near)}?" if near else ""
    raise DataError(
        f"{what}: column{'s' * (len(missing) > 1)} {listed} "
        f"{'are' if len(missing) > 1 else 'is'} missing in {source.name} (has: {has}).{hint}"
    )


def column(source: RowSource, name: str) -> list[Any]:
    """All cells of one column of a map-style source, by the quickest way it offers."""
    if isinstance(source, View):
        cells = column(source.source, name)
        return [cells[int(index)] for index in source.indices]
    quick = getattr(source, "column", None)
    if quick is not None:
        return list(quick(name))
    return [
        row[name]
        for start in range(0, len(source), _STEP)
        for row in source.take(range(start, min(start + _STEP, len(source))))
    ]
