"""Files of tensors in the safetensors format, summed in the same pass that writes or reads them.

    8 bytes: length of the header | header: JSON, padded with blanks | the tensors' bytes, no gaps

safetensors has no checksum, and summing a file after writing it would read it all again. Here a
thread sums the tensors while they are written, so the sum is of what was meant and also finds what
the disk got wrong. Reading maps the file, as the safetensors package does, and sums the mapped
bytes. Any safetensors library reads these files, and this module reads theirs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polytask.errors import CheckpointError
from polytask.files import PIECE, Checksum, checksum

NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
ALIGNMENT = 64  # bytes, as torch allocates
DTYPES = {name: dtype for dtype, name in NAMES.items()}


def write_file(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors and return the file's `Checksum` text; `OSError` as the system raises it."""
    for name, tensor in tensors.items():
        if tensor.dtype not in NAMES:
            raise CheckpointError(f"{path}: '{name}' is {tensor.dtype}, which has no format here")
    order = sorted(tensors, key=lambda name: _place(name, tensors[name]))
    total, parts = Checksum(), (_bytes_of(tensors[name]) for name in order)

    def sum_up(views: list[memoryview]) -> None:
        for view in views:
            total.add(view)

    with path.open("wb") as handle, ThreadPoolExecutor(1) as pool:
        written: list[memoryview] = []
        sums = []
        for view in chain([memoryview(_header(order, tensors))], parts):
            written.append(view)
            if len(view) >= PIECE:  # small ones wait for company
                sums.append(pool.submit(sum_up, written))
                written = []
            handle.write(view)
        sums.append(pool.submit(sum_up, written))
        for done in sums:
            done.result()
    return total.text


def _place(name: str, tensor: Tensor) -> tuple[int, bool, str]:
    """Wide types first, so that every tensor lies at a multiple of its element's size; among them
    those first that leave the next one aligned for the processor."""
    size = tensor.element_size()
    return -size, tensor.numel() * size % ALIGNMENT != 0, name


def _header(order: list[str], tensors: Mapping[str, Tensor]) -> bytes:
    entries, end = {}, 0
    for name in order:
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        shape = list(tensors[name].shape)
        kind = NAMES[tensors[name].dtype]
        entries[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's bytes, copied only from another device or where they are not contiguous."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return _view(flat.view(torch.uint8)) if flat.numel() else memoryview(b"")


def _view(memory: Tensor) -> memoryview:
    array: Any = memory.numpy()
    return memoryview(array)


def read_file(path: Path, check: bool = True) -> tuple[dict[str, Tensor], str]:
    """The tensors and the file's `Checksum` text (empty without `check`, which reads all of it).

    Tensors are views of the file, mapped privately: copy what is to outlive it. `CheckpointError`
    when the file cannot be read or does not hold what its header says.
    """
    try:
        size = path.stat().st_size
        if size < 8:
            raise ValueError("it ends too early")
        memory = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        view = _view(memory)
        length = int.from_bytes(view[:8], "little")
        if size < 8 + length:
            raise ValueError("it ends too early")
        header = json.loads(bytes(view[8 : 8 + length]))
        header.pop("__metadata__", None)
        data = memory[8 + length :]
        found = {name: _tensor(data, entry) for name, entry in header.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return found, checksum(view) if check else ""


def _tensor(data: Tensor, entry: Mapping[str, Any]) -> Tensor:
    dtype, shape, (start, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    if not 0 <= start <= end <= len(data) or end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"bytes {start} to {end} cannot be {dtype} of shape {shape}")
    part = data[start:end]
    if part.data_ptr() % ALIGNMENT:
        part = part.clone()  # torch and its users count on the alignment of their own memory
    return part.view(dtype).reshape(shape)
