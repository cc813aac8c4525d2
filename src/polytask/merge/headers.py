"""The header of a safetensors file, read and checked without touching a tensor.

    8 bytes: length of the header | header: JSON | the tensors' bytes, no gaps

A file that is too short for what its header says was not copied or downloaded whole; it is named
before anything is merged.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from polytask.errors import MergeError
from polytask.train.tensorfile import DTYPES as TRAINED

DTYPES: dict[str, torch.dtype] = {
    **TRAINED,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LONGEST = 100_000_000  # bytes of a header; the safetensors package refuses longer ones too


@dataclass(frozen=True)
class TensorHeader:
    """What is known of a tensor before it is read.

    Attributes:
        shape, dtype: as stored.
        place: where its bytes are; names with one place share one tensor.
        whole: it can only be made as a whole, not piece by piece.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    place: tuple[Any, ...]
    whole: bool = False

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize


def read_header(path: Path) -> tuple[dict[str, TensorHeader], dict[str, str]]:
    """Tensors by name (place: path, first byte, bytes) and the metadata of a safetensors file.

    Raises:
        MergeError: no safetensors file, truncated, or tensors that do not fit their bytes.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            start = handle.read(8)
            length = int.from_bytes(start, "little")
            if start.startswith(b"version "):
                raise MergeError(
                    f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` there"
                )
            if size < 8 or not 2 <= length <= LONGEST:
                raise MergeError(f"{path} is not a safetensors file, or its first bytes are lost")
            text = handle.read(length)
    except OSError as error:
        raise MergeError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(text) < length:
        raise MergeError(_too_short(path, size, 8 + length))
    try:
        entries = json.loads(text)
        metadata = {str(k): str(v) for k, v in entries.pop("__metadata__", {}).items()}
        found = {name: _header(path, name, 8 + length, entry) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MergeError(f"{path} has a damaged header: {error}") from error
    end = max((h.place[1] + h.nbytes for h in found.values()), default=8 + length)
    if size < end:
        raise MergeError(_too_short(path, size, end))
    return found, metadata


def _header(path: Path, name: str, data: int, entry: Mapping[str, Any]) -> TensorHeader:
    if entry["dtype"] not in DTYPES:
        raise MergeError(f"{path}: tensor '{name}' has type {entry['dtype']}, which torch lacks")
    begin, end = entry["data_offsets"]
    header = TensorHeader(
        tuple(int(n) for n in entry["shape"]),
        DTYPES[entry["dtype"]],
        (str(path), data + int(begin), int(end) - int(begin)),
    )
    if begin < 0 or end - begin != header.nbytes:
        raise MergeError(
            f"{path}: tensor '{name}' of shape {header.shape} and type {entry['dtype']} cannot "
            f"have bytes {begin} to {end}"
        )
    return header


def _too_short(path: Path, size: int, needed: int) -> str:
    return (
        f"{path} is truncated: {size:,} bytes where its header needs {needed:,}. Copy or download "
        "it again"
    )


def make_header(
    entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """Header bytes of a file that holds `entries` (name -> type, shape) in this order, and the
    first byte of each in the file."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name, (dtype, shape) in entries.items():
        size = math.prod(shape) * dtype.itemsize
        table[name] = {
            "dtype": NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % 64)
    start = 8 + len(text)
    places = {name: start + table[name]["data_offsets"][0] for name in entries}
    return len(text).to_bytes(8, "little") + text, places
