"""From raw labels to a schema: classes that occur, outputs, horizons, sizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from polytask.errors import TaskError
from polytask.tasks.config import as_columns
from polytask.tasks.plan import Draft
from polytask.tasks.schemas import (
    Choice,
    Classification,
    Dense,
    Forecasting,
    Generation,
    LanguageModel,
    Matching,
    MultiLabel,
    Pair,
    Regression,
    Schema,
    Tagging,
    Words,
    brief,
    is_missing,
    label_key,
    split_labels,
)
from polytask.tasks.schemas.values import plane_of

MOST_CLASSES = 10_000
LARGEST_MAP = 64  # pixels a side of a guessed label grid


def finish_schema(draft: Draft, labels: Sequence[Any]) -> Schema:
    """The schema of a draft, given all its raw labels (missing ones left out)."""
    if not labels and draft.label_columns:
        raise TaskError(
            f"{draft.what}: every label in column '{draft.label_columns[0]}' is missing"
        )
    makers: dict[str, Callable[[Draft, Sequence[Any]], Schema]] = {
        "classification": lambda d, found: Classification(*_classes(d, found)),
        "pair": lambda d, found: Pair(*_classes(d, found)),
        "tagging": lambda d, found: Tagging(*_classes(d, [t for tags in found for t in tags])),
        "multilabel": _multilabel,
        "choice": lambda d, _: Choice(_choices(d)),
        "regression": _regression,
        "forecasting": _forecasting,
        "dense": _dense,
        "matching": lambda d, _: Matching(d.config.temperature),
        "generation": lambda d, _: Generation(_words(d)),
        "language_model": lambda d, _: LanguageModel(),
    }
    try:
        return makers[draft.kind](draft, labels)
    except ValueError as error:
        raise TaskError(f"{draft.what}: {error}") from None


def _words(draft: Draft) -> Words:
    return tuple((draft.config.verbaliser or {}).items())


def _choices(draft: Draft) -> str:
    return next(f for f in draft.fields if f.slot == "choices").columns[0]


def _classes(draft: Draft, labels: Iterable[Any]) -> tuple[tuple[str, ...], Words]:
    """Class names and the verbaliser; names in the user's order, else sorted."""
    config, words = draft.config, _words(draft)
    observed = Counter(label_key(label) for label in labels if not is_missing(label))
    if config.classes is not None:
        names = config.classes
    elif words:
        names = tuple(dict.fromkeys(word for _, word in words))
    else:
        names = tuple(sorted(observed, key=_natural))
    if len(names) < 2:
        only = f" ('{names[0]}')" if names else ""
        raise ValueError(
            f"column {' and '.join(map(repr, draft.label_columns))} has only one class{only}; "
            "there is nothing to tell apart"
        )
    if len(names) > MOST_CLASSES:
        raise ValueError(
            f"{len(names)} distinct labels are too many for classes; is this a regression, "
            "generation or matching task? Say so with 'schema'."
        )
    known = {label_key(name) for name in names}
    if config.classes is not None and not words and observed and not known & set(observed):
        numbered = {str(number): name for number, name in enumerate(names)}
        if set(observed) <= set(numbered):  # class numbers, with names given beside them
            words = tuple(numbered.items())
    return names, words


def _natural(key: str) -> tuple[int, float, str]:
    """Numbers by size before words by alphabet."""
    try:
        return (0, float(key), key)
    except ValueError:
        return (1, 0.0, key)


def _multilabel(draft: Draft, labels: Sequence[Any]) -> Schema:
    config = draft.config
    if isinstance(config.target, tuple) and len(config.target) > 1:
        return MultiLabel(config.classes or config.target)
    if config.classes is None and config.verbaliser is None:
        lengths = {len(label) for label in labels if isinstance(label, list | tuple | np.ndarray)}
        flags = all(
            not isinstance(v, str) and (is_missing(v) or float(v) in (0.0, 1.0))
            for label in labels
            if isinstance(label, list | tuple | np.ndarray)
            for v in label
        )
        if len(lengths) == 1 and max(lengths) > 2 and flags:
            return MultiLabel(tuple(str(k) for k in range(max(lengths))))
    return MultiLabel(*_classes(draft, [item for label in labels for item in split_labels(label)]))


def _regression(draft: Draft, labels: Sequence[Any]) -> Schema:
    first = labels[0]
    size = 1 if isinstance(first, str) else int(np.size(first))
    return Regression(size, (0.0,) * size, (1.0,) * size)


def _forecasting(draft: Draft, labels: Sequence[Any]) -> Schema:
    horizon = draft.config.horizon
    if not labels:
        if horizon is None:
            raise ValueError("forecasting without a target column needs 'horizon'")
        return Forecasting(horizon)
    shape = np.shape(labels[0])
    length = shape[0] if shape else 1
    return Forecasting(horizon or length, shape[1] if len(shape) > 1 else 1)


def _dense(draft: Draft, labels: Sequence[Any]) -> Schema:
    config, classes = draft.config, draft.config.classes
    first = plane_of(labels[0])
    height = config.height or min(first.shape[0], LARGEST_MAP)
    width = config.width or min(first.shape[1], LARGEST_MAP)
    if classes is None:
        top = 0
        for label in labels:
            plane = plane_of(label)
            known = plane[~np.isnan(plane)]
            if (known != np.floor(known)).any() or (known < -100).any() or (known > 255).any():
                return Dense(None, height, width)
            top = max(top, int(known.max(initial=0)))
        classes = tuple(str(k) for k in range(top + 1))
    return Dense(classes or None, height, width)


def check_range(draft: Draft, schema: Schema, labels: Sequence[Any], split: str) -> None:
    """`TaskError` when the train labels of a draft leave nothing to learn."""
    columns = " and ".join(f"'{c}'" for c in as_columns(draft.target))
    if split != "train" or not labels:
        return
    if isinstance(schema, Classification):
        seen = {schema.read(label) for label in labels}
        if len(seen) < 2:
            raise TaskError(
                f"{draft.what}: the train split has only one class "
                f"({brief(schema.classes[next(iter(seen))])}) in column {columns}; "
                "there is nothing to tell apart"
            )
    elif isinstance(schema, Regression):
        values = np.stack([schema.read(label) for label in labels])
        if len(values) > 1 and (values == values[0]).all():
            raise TaskError(
                f"{draft.what}: all targets in column {columns} are "
                f"{brief(values[0].tolist())}; there is nothing to learn"
            )
    elif isinstance(schema, MultiLabel) and not np.nansum(
        [np.nansum(schema.read(label)) for label in labels]
    ):
        raise TaskError(f"{draft.what}: no row of the train split has any label in {columns}")
