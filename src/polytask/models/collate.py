"""list[Example] -> Batch: padding, row ids and pairs, with NumPy and no loop over tokens.

An example is one row: its sequences (dictionaries named as in `polytask.models.batch`) and its
targets by task id. A pair without any known label is left out here, on the host, so that no loss
ever has to ask the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from polytask.models.batch import Batch, Target

Array = npt.NDArray[Any]
IGNORE = -100


class Example(Protocol):
    """A row as encoded by `polytask.tasks.encode.Processor`."""

    sequences: list[dict[str, Array]]
    targets: dict[int, Any]
    row: int


class Collator:
    """Holds what is known of the tasks, so that a call only handles the examples.

    kinds  head kind of each task id
    groups first task id and all task ids of each row group (for unlabelled rows and for
           `Batch.task`); without it, the smallest task id among a row's targets counts
    pad_id fills text beyond its length
    """

    def __init__(
        self, kinds: Sequence[str], groups: Sequence[Sequence[int]] = (), pad_id: int = 0
    ) -> None:
        self.kinds = tuple(kinds)
        self.groups = tuple(tuple(group) for group in groups)
        self.pad_id = pad_id

    @classmethod
    def of(cls, taskset: Any, pad_id: int = 0) -> Collator:
        """For a `polytask.tasks.task.TaskSet`."""
        kinds: list[str] = []
        groups: list[tuple[int, ...]] = []
        for group in taskset.groups:
            first = len(kinds)
            kinds += [task.schema.head for task in group.tasks]
            groups.append(tuple(range(first, len(kinds))))
        return cls(kinds, groups, pad_id)

    def __call__(
        self,
        examples: Sequence[Example],
        group: Sequence[int] | Array | None = None,
        unlabelled: bool = False,
    ) -> Batch:
        """Batch of the examples, in order.

        group       row group of each example
        unlabelled  also make pairs for the tasks of the row's group that it has no label for
                    (prediction); their labels are marked unknown
        """
        sequences = [sequence for example in examples for sequence in example.sequences]
        count = np.fromiter((len(e.sequences) for e in examples), np.int64, len(examples))
        first = np.cumsum(count) - count
        row = np.fromiter((e.row for e in examples), np.int64, len(examples))
        task = self._tasks(examples, group)
        pairs: dict[str, list[tuple[int, int, Any]]] = {}
        for i, example in enumerate(examples):
            targets: Mapping[int, Any] = example.targets
            if unlabelled and group is not None:
                targets = {t: targets.get(t) for t in self.groups[int(group[i])]}
            for t, value in targets.items():
                kind = self.kinds[t]
                if unlabelled or _KNOWN[kind](value):
                    pairs.setdefault(kind, []).append((i, t, value))
        return Batch(
            fields=self._fields(sequences),
            targets={
                kind: _target(kind, found, count, first, row) for kind, found in pairs.items()
            },
            task=torch.from_numpy(np.repeat(task, count)),
            row=torch.from_numpy(np.repeat(row, count)),
            rows=len(examples),
            complete=not unlabelled,
        )

    def _tasks(self, examples: Sequence[Example], group: Sequence[int] | Array | None) -> Array:
        if group is not None and self.groups:
            first = np.fromiter((g[0] for g in self.groups), np.int64, len(self.groups))
            found: Array = first[np.asarray(group)]
            return found
        return np.fromiter((min(e.targets, default=0) for e in examples), np.int64, len(examples))

    def _fields(self, sequences: Sequence[Mapping[str, Array]]) -> dict[str, Tensor]:
        holders: dict[str, list[int]] = {}
        for i, sequence in enumerate(sequences):
            for modality in {name.partition(".")[0] for name in sequence}:
                holders.setdefault(modality, []).append(i)
        fields: dict[str, Tensor] = {}
        for modality, where in holders.items():
            made = _MODALITIES[modality]([sequences[i] for i in where], self.pad_id)
            made[f"{modality}.sequence"] = np.asarray(where, np.int64)
            fields.update({name: torch.from_numpy(value) for name, value in made.items()})
        return fields


def collate(
    examples: Sequence[Example],
    kinds: Sequence[str],
    group: Sequence[int] | None = None,
    pad_id: int = 0,
) -> Batch:
    """One-off form of `Collator`; `kinds` gives the head kind of each task id."""
    return Collator(kinds, (), pad_id)(examples, group)


def _padded(values: Sequence[Array], fill: float, dtype: type) -> tuple[Array, Array]:
    """Arrays of equal rank as one, padded at the end of each axis; and their shapes (n, rank)."""
    shapes = np.array([value.shape for value in values], np.int64)
    widest = shapes.max(0)
    out = np.full((len(values), *widest), fill, dtype)
    if (shapes == widest).all():
        np.stack(values, out=out, casting="unsafe")
    elif len(widest) == 1:
        out[np.arange(widest[0]) < shapes] = np.concatenate(values)
    else:
        for i, value in enumerate(values):
            inside: tuple[Any, ...] = (i, *map(slice, value.shape))
            out[inside] = value
    return out, shapes


def _columns(value: Any) -> Array:
    """(L,) as (L, 1)."""
    array = np.asarray(value)
    return array if array.ndim > 1 else array[:, None]


def _text(sequences: Sequence[Mapping[str, Array]], pad_id: int) -> dict[str, Array]:
    ids, shapes = _padded([s["text.ids"] for s in sequences], pad_id, np.int64)
    length = shapes[:, 0].copy()
    prefix = np.fromiter(
        (s.get("text.prefix", n) for s, n in zip(sequences, length, strict=True)),
        np.int64,
        len(sequences),
    )
    return {"text.ids": ids, "text.length": length, "text.prefix": prefix}


def _image(sequences: Sequence[Mapping[str, Array]], pad_id: int) -> dict[str, Array]:
    return {"image.pixels": np.stack([s["image.pixels"] for s in sequences])}


def _series(sequences: Sequence[Mapping[str, Array]], pad_id: int) -> dict[str, Array]:
    columns = [_columns(s["series.values"]) for s in sequences]
    values, shapes = _padded(columns, np.nan, np.float32)
    length, channels = shapes.T.copy()
    return {"series.values": values, "series.length": length, "series.channels": channels}


def _table(sequences: Sequence[Mapping[str, Array]], pad_id: int) -> dict[str, Array]:
    none = np.zeros(0)
    made: dict[str, Array] = {}
    if any("table.number" in s for s in sequences):
        number = [s.get("table.number", none) for s in sequences]
        number_id = [s.get("table.number_id", none) for s in sequences]
        made["table.number"], _ = _padded(number, np.nan, np.float32)
        made["table.number_id"], _ = _padded(number_id, -1, np.int64)
    if any("table.category" in s for s in sequences):
        category = [s.get("table.category", none) for s in sequences]
        made["table.category"], _ = _padded(category, -1, np.int64)
    return made


def _features(sequences: Sequence[Mapping[str, Array]], pad_id: int) -> dict[str, Array]:
    rows = [np.atleast_2d(np.asarray(s["features.values"])) for s in sequences]
    values, shapes = _padded(rows, 0.0, np.float32)
    return {"features.values": values, "features.length": shapes[:, 0].copy()}


_MODALITIES: dict[str, Callable[[Sequence[Mapping[str, Array]], int], dict[str, Array]]] = {
    "text": _text,
    "image": _image,
    "series": _series,
    "table": _table,
    "features": _features,
}


def _some_number(value: Any) -> bool:
    return value is not None and not bool(np.isnan(value).all())


def _some_label(value: Any) -> bool:
    return value is not None and bool((np.asarray(value) != IGNORE).any())


def _index(value: Any) -> bool:
    return value is not None and int(value) >= 0


def _some_pixel(value: Any) -> bool:
    if value is None:
        return False
    array = np.asarray(value)
    return _some_number(array) if array.dtype.kind == "f" else _some_label(array)


_KNOWN: dict[str, Callable[[Any], bool]] = {
    "classify": _index,
    "choice": _index,
    "match": _index,
    "multilabel": _some_number,
    "regress": _some_number,
    "forecast": _some_number,
    "tag": _some_label,
    "generate": _some_label,
    "dense": _some_pixel,
}
# Rank and filling of labels that are arrays; the others are integers, -1 = unknown.
_ARRAYS: dict[str, tuple[int, float, type]] = {
    "multilabel": (1, np.nan, np.float32),
    "regress": (1, np.nan, np.float32),
    "forecast": (2, np.nan, np.float32),
    "dense": (2, np.nan, np.float32),
    "tag": (1, IGNORE, np.int64),
    "generate": (1, IGNORE, np.int64),
}


def _value(kind: str, value: Any) -> Array:
    rank, fill, dtype = _ARRAYS[kind]
    if value is None:
        return np.full((0,) * rank, fill, dtype)
    array = np.atleast_1d(np.asarray(value))
    if kind == "dense" and array.dtype.kind in "iu":
        return np.where(array == IGNORE, np.nan, array).astype(np.float32)
    return array if array.ndim == rank else array.reshape(array.shape + (1,) * (rank - array.ndim))


def _target(
    kind: str,
    pairs: Sequence[tuple[int, int, Any]],
    count: Array,
    first: Array,
    row: Array,
) -> Target:
    example = np.fromiter((i for i, _, _ in pairs), np.int64, len(pairs))
    task = np.fromiter((t for _, t, _ in pairs), np.int64, len(pairs))
    several = count[example] if kind in ("choice", "match") else np.ones_like(example)
    column = np.arange(several.max(initial=1))
    sequence = np.where(column < several[:, None], first[example][:, None] + column, -1)
    size: Tensor | None = None
    if kind in _ARRAYS:
        _, fill, dtype = _ARRAYS[kind]
        value, shapes = _padded([_value(kind, v) for _, _, v in pairs], fill, dtype)
        size = torch.from_numpy(shapes)
    else:
        value = np.fromiter((-1 if v is None else v for _, _, v in pairs), np.int64, len(pairs))
    return Target(
        sequence=torch.from_numpy(sequence),
        task=torch.from_numpy(task),
        row=torch.from_numpy(row[example]),
        value=torch.from_numpy(value),
        size=size,
    )
