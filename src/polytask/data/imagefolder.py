"""Rows with pictures: a folder per class, or a table with a column of paths."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from polytask.data.columns import column
from polytask.data.images import SUFFIXES, check_image
from polytask.data.problems import RowProblems
from polytask.data.rows import MemoryRows, Row, RowSource, StreamSource, View
from polytask.errors import DataError

_LOOK = 50


@dataclass(frozen=True)
class FileRows(MemoryRows):
    """Rows that are one file each; `where` is the file."""

    files: Sequence[Path] = ()
    problems: RowProblems | None = None
    images: tuple[str, ...] = ("image",)

    def where(self, index: int) -> str:
        return str(self.files[index])


def class_folder(
    folder: Path, label_column: str = "label", max_bad: float = 0.01, decode: bool = True
) -> FileRows:
    """A row per image file below a sub-folder that names its class: {'image': path, label: class}.

    Images that do not decode, and images outside the class folders, are bad rows.
    """
    files = list(image_files(folder))
    if not files:
        raise DataError(f"{folder} has no image files ({', '.join(sorted(SUFFIXES))})")
    problems = RowProblems(str(folder), max_bad)
    good = []
    for file, fault in zip(files, _faults(files, decode)):
        if file.parent == folder:
            fault = "it stands outside the folders that name the classes"
        if fault is None:
            good.append(file)
        else:
            problems.add(str(file), fault)
    problems.conclude(len(good))
    rows = [{"image": str(file), label_column: file.relative_to(folder).parts[0]} for file in good]
    return FileRows(rows, folder.name, good, problems)


def image_files(folder: Path) -> Iterator[Path]:
    """Image files below a folder in a fixed order, hidden ones left out."""
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES:
                yield Path(here, name)


def image_columns(source: RowSource | StreamSource, root: Path) -> tuple[str, ...]:
    """Columns whose first cells all look like image files, one of which stands below `root`."""
    first = (
        list(islice(source.read_from(0), _LOOK))
        if not isinstance(source, RowSource)
        else source.take(range(min(_LOOK, len(source))))
    )
    found = []
    for name in source.columns:
        cells = [row[name] for row in first if row.get(name) not in (None, "")]
        if (
            cells
            and all(isinstance(c, str) and Path(c).suffix.lower() in SUFFIXES for c in cells)
            and any((root / c).is_file() for c in cells)
        ):
            found.append(name)
    return tuple(found)


def with_images(
    source: RowSource,
    names: Sequence[str],
    root: Path,
    max_bad: float = 0.01,
    decode: bool = True,
) -> ImageRows:
    """Rows whose image columns are whole paths; rows whose image is missing or broken are bad."""
    problems = RowProblems(source.name, max_bad)
    bad: dict[int, str] = {}
    for name in names:
        cells = column(source, name)
        present = [row for row, cell in enumerate(cells) if cell not in (None, "")]
        paths = [root / str(cells[row]) for row in present]
        for row, fault in zip(present, _faults(paths, decode)):
            if fault is not None:
                bad.setdefault(row, f"image {root / str(cells[row])} {fault}")
    for row, fault in sorted(bad.items()):
        problems.add(source.where(row), fault)
    problems.conclude(len(source) - len(bad))
    kept: Sequence[int] = range(len(source))
    if bad:
        kept = np.delete(np.arange(len(source)), list(bad)).tolist()
    return ImageRows(View(source, kept), tuple(names), root, problems)


@dataclass(frozen=True)
class ImageRows:
    """A source whose image columns are resolved against a folder."""

    source: RowSource
    images: tuple[str, ...]
    root: Path
    problems: RowProblems

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def columns(self) -> tuple[str, ...]:
        return self.source.columns

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Row:
        return resolved(self.source[index], self.images, self.root)

    def take(self, indices: Sequence[int]) -> list[Row]:
        return [resolved(row, self.images, self.root) for row in self.source.take(indices)]

    def column(self, name: str) -> list[Any]:
        cells = column(self.source, name)
        if name not in self.images:
            return cells
        return [str(self.root / cell) if cell else cell for cell in cells]

    def where(self, index: int) -> str:
        return self.source.where(index)


@dataclass(frozen=True)
class ImageStream:
    """A stream whose image columns are resolved; a broken image shows when it is decoded."""

    source: StreamSource
    images: tuple[str, ...]
    root: Path

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def columns(self) -> tuple[str, ...]:
        return self.source.columns

    def read_from(self, position: int) -> Iterator[Row]:
        for row in self.source.read_from(position):
            yield resolved(row, self.images, self.root)

    def where(self, index: int) -> str:
        return self.source.where(index)


def resolved(row: Row, images: Sequence[str], root: Path) -> Row:
    """The row with its image paths joined to `root`."""
    return {**row, **{name: str(root / row[name]) for name in images if row.get(name)}}


def _faults(paths: Sequence[Path], decode: bool) -> list[str | None]:
    """Why each file is no image, or None; Pillow decodes in parallel threads."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda path: check_image(path, decode), paths, chunksize=64))
