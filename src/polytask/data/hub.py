"""Hugging Face data sets: by id from the hub (or its cache), or saved in a folder.

Class labels are given as their names, so that tasks read words instead of numbers whose meaning
stands elsewhere; -1, the mark of a hidden label, is None. Images stay encoded bytes or a path.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from polytask.data.arrow import bad_rows
from polytask.data.cells import rows_of
from polytask.data.problems import RowProblems
from polytask.data.rows import Row, RowSource, StreamSource, View
from polytask.errors import DataError

Splits = dict[str, RowSource | StreamSource]


class HubRows:
    """A memory-mapped `datasets.Dataset` as a `RowSource`."""

    def __init__(self, dataset: Any, name: str) -> None:
        dataset, self._names = _undecoded(dataset)
        self.name = name
        self.columns: tuple[str, ...] = tuple(dataset.column_names)
        self._data = dataset.with_format("arrow")

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Row:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} rows, not {index}")
        return self.take([index % len(self)])[0]

    def take(self, indices: Sequence[int]) -> list[Row]:
        rows = rows_of(self._data[[int(i) for i in indices]]) if len(indices) else []
        return [_named(row, self._names) for row in rows]

    def where(self, index: int) -> str:
        return f"{self.name}, row {index + 1}"

    def bad_rows(self) -> dict[int, str]:
        """Rows that are empty or hold a cell of more than 10 MB."""
        step, bad = 10_000, {}
        for start in range(0, len(self), step):
            piece = bad_rows(self._data[start : start + step])
            bad.update({start + row: reason for row, reason in piece.items()})
        return bad


class HubStream:
    """A `datasets.IterableDataset` as a `StreamSource`. Its rows are typed by the hub and are not
    validated again; a position is reached by the set's own `skip`."""

    def __init__(self, dataset: Any, name: str) -> None:
        self._data, self._names = _undecoded(dataset)
        self.name = name
        names = self._data.column_names
        self.columns: tuple[str, ...] = tuple(
            names if names is not None else next(iter(self._data), {})
        )

    def read_from(self, position: int) -> Iterator[Row]:
        data = self._data.skip(position) if position else self._data
        for row in data:
            yield _named(row, self._names)

    def where(self, index: int) -> str:
        return f"{self.name}, row {index + 1}"


def read_saved(folder: Path, max_bad: float = 0.01) -> Splits:
    """Splits of a folder that `save_to_disk` wrote; one set without splits is 'all'."""
    import datasets

    try:
        found = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder} is not a whole saved data set: {error}") from error
    return _splits(found, str(folder), max_bad)


def read_hub(identifier: str, split: str | None, streaming: bool, max_bad: float = 0.01) -> Splits:
    """Splits of 'owner/name' or 'owner/name/configuration' from the hub, or from its cache.

    `DataError` when it is not there, or the hub cannot be reached and the cache does not have it.
    """
    found = None
    ways = _ways(identifier)
    for position, arguments in enumerate(ways):
        found = _load(identifier, arguments, split, streaming, last=position == len(ways) - 1)
        if found is not None:
            break
    name = f"hub:{identifier}"
    if split is not None:
        return _splits({split: found}, name, max_bad)
    return _splits(found, name, max_bad)


def _ways(identifier: str) -> list[tuple[str, ...]]:
    """Arguments for `load_dataset`: 'a/b' is a set of an owner, or else a set's configuration."""
    parts = identifier.strip("/").split("/")
    if len(parts) == 3:
        return [("/".join(parts[:2]), parts[2])]
    return [(identifier,), tuple(parts)] if len(parts) == 2 else [(identifier,)]


def _load(
    identifier: str, arguments: Sequence[str], split: str | None, streaming: bool, last: bool
) -> Any:
    import datasets

    try:
        return datasets.load_dataset(*arguments, split=split, streaming=streaming)
    except datasets.exceptions.DatasetNotFoundError as error:
        if not last:
            return None
        raise DataError(f"there is no data set '{identifier}' on the hub: {error}") from error
    except ValueError as error:  # unknown split or configuration; the message lists them
        raise DataError(f"hub:{identifier}: {error}") from error
    except OSError as error:  # ConnectionError, and reading with the hub switched off
        raise DataError(
            f"hub:{identifier} is not in the cache and the hub cannot be reached: {error}. "
            "Connect once and try again, or save the set on another machine "
            "(datasets.load_dataset(...).save_to_disk(FOLDER)) and give path: FOLDER"
        ) from error


def _splits(found: Any, name: str, max_bad: float) -> Splits:
    parts = found if isinstance(found, Mapping) else {"all": found}
    made: Splits = {}
    for split, dataset in parts.items():
        label = name if split == "all" else f"{name}[{split}]"
        if not hasattr(dataset, "__len__"):
            made[str(split)] = HubStream(dataset, label)
            continue
        rows = HubRows(dataset, label)
        bad = rows.bad_rows()
        problems = RowProblems(label, max_bad)
        for row, reason in bad.items():
            problems.add(rows.where(row), reason)
        problems.conclude(len(rows) - len(bad))
        kept = [row for row in range(len(rows)) if row not in bad]
        made[str(split)] = View(rows, kept) if bad else rows
    return made


def _undecoded(dataset: Any) -> tuple[Any, dict[str, list[str]]]:
    """The set with media left encoded, and the names of its class labels by column."""
    import datasets

    features = dataset.features or {}
    for column, feature in features.items():
        if isinstance(feature, datasets.Image | datasets.Audio):
            dataset = dataset.cast_column(column, type(feature)(decode=False))
    names = {
        column: list(feature.names)
        for column, feature in features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    return dataset, names


def _named(row: dict[str, Any], names: Mapping[str, list[str]]) -> Row:
    for column, words in names.items():
        label = row[column]
        row[column] = None if label is None or label < 0 else words[label]
    for column, cell in row.items():
        if isinstance(cell, dict) and cell.keys() == {"bytes", "path"}:
            row[column] = cell["bytes"] if cell["bytes"] is not None else cell["path"]
    return row
