"""Opens what a task's `data` names: rows by split, or one source that is still to be split."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polytask.data.rows import MemoryRows, RowSource, StreamSource
from polytask.errors import ConfigError, DataError, UserError
from polytask.tasks.splits import ALIASES, SPLITS

Source = RowSource | StreamSource
WHOLE = "all"  # the name of a source that is still to be split


def open_sources(data: Any, base: Path, what: str) -> dict[str, Source]:
    """Sources by split name; {'all': source} where the data has no splits of its own."""
    if isinstance(data, Mapping) and data and all(str(k).lower() in ALIASES for k in data):
        found: dict[str, Source] = {}
        for key, part in data.items():
            name = ALIASES[str(key).lower()]
            if name in found:
                raise ConfigError(f"{what}: data names the split '{name}' twice")
            found[name] = _single(part, base, what)
        if "train" not in found:
            raise ConfigError(f"{what}: data has no 'train' (has: {', '.join(found)})")
        return found
    direct = as_source(data)
    if direct is not None:
        return {WHOLE: direct}
    return _by_spec(data, base, what)


def _by_spec(data: Any, base: Path, what: str) -> dict[str, Source]:
    from polytask.data.open import open_splits
    from polytask.data.spec import DataSpec

    spec = DataSpec.of(data, f"{what}: data")
    try:
        found = open_splits(spec, base)
    except UserError as error:
        raise type(error)(f"{what}: {error}") from error
    used = {name: source for name, source in found.items() if name in (*SPLITS, WHOLE)}
    if "train" in used or WHOLE in used:
        return used
    raise DataError(
        f"{what}: {spec.name} has no split 'train' (has: {', '.join(found)}); "
        "name its splits: data: {train: {..., split: NAME}, test: ...}"
    )


def _single(data: Any, base: Path, what: str) -> Source:
    direct = as_source(data)
    if direct is not None:
        return direct
    opened = open_sources(data, base, what)
    if set(opened) != {WHOLE}:
        raise ConfigError(
            f"{what}: {data!r} has splits of its own ({', '.join(opened)}); "
            "say which one with 'split'"
        )
    return opened[WHOLE]


def as_source(data: Any) -> Source | None:
    """Rows given from Python: a source, a list of rows, a data frame, a mapping of columns."""
    if hasattr(data, "to_dict") and hasattr(data, "columns"):  # before the protocols: it has all
        return MemoryRows(data.to_dict(orient="records"), name="data frame")
    if isinstance(data, RowSource | StreamSource):
        return data
    return MemoryRows(data) if isinstance(data, list) else None
