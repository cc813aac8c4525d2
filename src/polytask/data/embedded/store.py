"""The cache of built data sets: Arrow for text and tables, safetensors for arrays, manifest last.

A cached set is a folder with one file per split, `meta.json` (columns, source, content checksum)
and the manifest. It is verified by checksum the first time a process opens it; a damaged one is
rebuilt from its package with a warning. Building happens under a lock, so two processes that race
for an empty cache both end with the same complete folder.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from polytask.data.embedded.columns import Ragged
from polytask.data.embedded.folders import builders_lock, whole
from polytask.data.embedded.info import Entry, Splits
from polytask.data.embedded.sources import Located, Source, cache_root, locate, missing
from polytask.errors import DataError
from polytask.files import MANIFEST, building, write_json

META = "meta.json"
_VALUES, _OFFSETS = "#values", "#offsets"


def open_splits(entry: Entry) -> dict[str, dict[str, Any]]:
    """Columns per split, from the cache where it is whole, else built and cached."""
    located = None if entry.info.fixed else locate(entry.info.sources)
    folder = _folder(entry, located)
    if folder is not None and _usable(entry, folder):
        return _read(folder)
    if located is None:
        located = locate(entry.info.sources)
    if located is None:
        raise missing(entry.info.name, entry.info.title, entry.info.sources)
    folder = _folder(entry, located)
    assert folder is not None
    with builders_lock(folder):
        if not _usable(entry, folder, warn=True):
            _build(entry, located, folder)
    return _read(folder)


def _usable(entry: Entry, folder: Path, warn: bool = False) -> bool:
    """True for a whole folder; fixed content must also be that of the present building rule."""
    if not whole(folder, warn):
        return False
    info = entry.info
    expected = info.checksum if info.fixed else ""
    return not expected or _meta(folder)["checksum"] == expected


def cached_meta(entry: Entry) -> Mapping[str, Any] | None:
    """What the cached copy was built from; None when there is none."""
    folder = _folder(entry, None if entry.info.fixed else locate(entry.info.sources))
    if folder is None or not (folder / MANIFEST).is_file():
        return None
    return _meta(folder)


def _meta(folder: Path) -> Mapping[str, Any]:
    meta: Mapping[str, Any] = json.loads((folder / META).read_text(encoding="utf-8"))
    return meta


def content_checksum(splits: Splits) -> str:
    """SHA-256 over split names, column names and cells: independent of how they are stored."""
    digest = hashlib.sha256()
    for split in sorted(splits):
        for column, cells in splits[split].items():
            digest.update(f"\0{split}\0{column}\0{len(cells)}\0".encode())
            if isinstance(cells, np.ndarray) and cells.dtype != object:
                _add_array(digest, cells)
                continue
            for cell in cells:
                _add_cell(digest, cell)
    return digest.hexdigest()


def _add_array(digest: Any, array: np.ndarray) -> None:
    little = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))
    digest.update(f"{little.dtype.str}{little.shape}".encode())
    digest.update(little.tobytes())


def _add_cell(digest: Any, cell: Any) -> None:
    if isinstance(cell, np.ndarray):
        _add_array(digest, cell)
        return
    data = cell if isinstance(cell, bytes) else repr(cell).encode("utf-8", "surrogatepass")
    digest.update(f"{type(cell).__name__}{len(data)}:".encode())
    digest.update(data)


def _folder(entry: Entry, found: tuple[Source, Located] | None) -> Path | None:
    """The cache folder; for content that follows its package, one per package version."""
    home = cache_root() / "embedded" / entry.info.name
    if entry.info.fixed:
        return home / f"v{entry.version}"
    if found is not None:
        return home / f"v{entry.version}-{found[1].label}-{found[1].version}"
    older = [path for path in home.glob(f"v{entry.version}-*") if (path / MANIFEST).is_file()]
    return max(older, key=lambda path: path.stat().st_mtime_ns, default=None)


def _build(entry: Entry, found: tuple[Source, Located], folder: Path) -> None:
    source, located = found
    try:
        splits = entry.build(located)
    except (OSError, ValueError, KeyError, IndexError, EOFError, zlib.error) as error:
        raise DataError(
            f"embedded data set '{entry.info.name}': the files of {located.label} "
            f"{located.version} in {located.root} cannot be read: {error!r}. "
            f"Verified with: {source.requirement}"
        ) from error
    checksum = content_checksum(splits)
    if entry.info.fixed and entry.info.checksum and checksum != entry.info.checksum:
        raise DataError(
            f"embedded data set '{entry.info.name}': the content read from {located.label} "
            f"{located.version} has checksum {checksum[:16]}, not the verified "
            f"{entry.info.checksum[:16]}; the files in {located.root} are altered"
        )
    with building(folder) as aside:
        meta = {
            "name": entry.info.name,
            "source": located.label,
            "source_version": located.version,
            "checksum": checksum,
            "rows": {split: len(next(iter(cols.values()))) for split, cols in splits.items()},
            "columns": {split: list(columns) for split, columns in splits.items()},
        }
        for split, columns in splits.items():
            _write_split(aside, split, columns)
        write_json(aside / META, meta)


def _write_split(folder: Path, split: str, columns: Mapping[str, Any]) -> None:
    """Numbers go to safetensors (ragged ones as values and offsets), text and bytes to Arrow."""
    tensors: dict[str, np.ndarray] = {}
    texts: dict[str, Any] = {}
    for name, cells in columns.items():
        first = cells[0]
        if isinstance(cells, np.ndarray):
            tensors[name] = np.ascontiguousarray(cells)
        elif isinstance(first, np.ndarray):
            tensors[name + _VALUES] = np.concatenate(cells)
            tensors[name + _OFFSETS] = np.cumsum([0, *map(len, cells)])
        elif isinstance(first, int | float):
            tensors[name] = np.asarray(cells)
        else:
            texts[name] = cells
    if tensors:
        from safetensors.numpy import save_file

        path = folder / f"{split}.safetensors"
        save_file(tensors, path)
        path.chmod(0o644)  # safetensors writes files that only their owner may read
    if texts:
        import pyarrow as pa

        table = pa.table({name: pa.array(cells) for name, cells in texts.items()})
        with (
            pa.OSFile(str(folder / f"{split}.arrow"), "wb") as sink,
            pa.ipc.new_file(sink, table.schema) as writer,
        ):
            writer.write_table(table)


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    meta = _meta(folder)
    return {
        split: _read_split(folder, split, columns) for split, columns in meta["columns"].items()
    }


def _read_split(folder: Path, split: str, columns: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if (folder / f"{split}.safetensors").is_file():
        from safetensors.numpy import load_file

        found |= load_file(folder / f"{split}.safetensors")
    if (folder / f"{split}.arrow").is_file():
        import pyarrow as pa

        with pa.memory_map(str(folder / f"{split}.arrow")) as source:
            table = pa.ipc.open_file(source).read_all()
        found |= {name: table.column(name) for name in table.column_names}
    for name in columns:
        if name + _VALUES in found:
            found[name] = Ragged(found[name + _VALUES], found[name + _OFFSETS])
    return {name: found[name] for name in columns}
