"""Numbers that stand for content: for splits, duplicates and leak checks.

A row's number depends on what its input cells hold, on nothing else: not on its place, the file,
the process or the machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from polytask.data.rows import Row
from polytask.tasks.schemas import is_missing, label_key

Hashes = npt.NDArray[np.uint64]


def cell_bytes(value: Any) -> bytes:
    """The content of a cell, the same for equal cells of any origin."""
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")
    if isinstance(value, bytes):
        return value
    if is_missing(value):
        return b"\x00missing"
    if isinstance(value, np.ndarray):
        return f"{value.dtype.str}{value.shape}".encode() + np.ascontiguousarray(value).tobytes()
    if isinstance(value, list | tuple):
        return b"\x1e".join(cell_bytes(item) for item in value)
    return label_key(value).encode()


def content_hashes(rows: Sequence[Row], columns: Sequence[str]) -> Hashes:
    """(rows,) uint64: equal where all `columns` hold equal content."""
    out = np.empty(len(rows), np.uint64)
    for i, row in enumerate(rows):
        out[i] = digest(b"\x1f".join([cell_bytes(row.get(column)) for column in columns]))
    return out


def digest(content: bytes) -> int:
    """64 bits that stand for some bytes."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def mix(values: Hashes, seed: int) -> Hashes:
    """Well-spread uint64 numbers, one per value and seed (the finaliser of SplitMix64,
    Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        z = values + np.uint64(seed & 0xFFFFFFFFFFFFFFFF) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
