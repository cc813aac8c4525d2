"""Where rows come from: users' files and hubs, embedded real corpora, simulators, generators.

Names are imported when first used, so `import polytask.data` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polytask.data.arrow import ArrowRows as ArrowRows
    from polytask.data.columns import column as column
    from polytask.data.columns import require_columns as require_columns
    from polytask.data.images import decode_image as decode_image
    from polytask.data.open import open_rows as open_rows
    from polytask.data.open import open_splits as open_splits
    from polytask.data.problems import RowProblems as RowProblems
    from polytask.data.proposing import propose as propose
    from polytask.data.rows import MemoryRows as MemoryRows
    from polytask.data.rows import Row as Row
    from polytask.data.rows import RowSource as RowSource
    from polytask.data.rows import StreamSource as StreamSource
    from polytask.data.rows import View as View
    from polytask.data.spec import DataSpec as DataSpec
    from polytask.data.spec import SeriesSpec as SeriesSpec

_HOMES = {
    "ArrowRows": "arrow",
    "DataSpec": "spec",
    "MemoryRows": "rows",
    "Row": "rows",
    "RowProblems": "problems",
    "RowSource": "rows",
    "SeriesSpec": "spec",
    "StreamSource": "rows",
    "View": "rows",
    "column": "columns",
    "decode_image": "images",
    "open_rows": "open",
    "open_splits": "open",
    "propose": "proposing",
    "require_columns": "columns",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'polytask.data' has no attribute '{name}'")
    return getattr(importlib.import_module(f"polytask.data.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
