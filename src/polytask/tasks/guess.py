"""What a configuration leaves out, guessed from the cells: target, inputs, schema.

Guesses look at a sample of rows. They only fill gaps: whatever the user says stays.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from polytask.data.rows import Row
from polytask.errors import TaskError
from polytask.tasks.config import InputsConfig, TaskConfig, as_columns
from polytask.tasks.schemas import is_missing, label_key

Kind = Literal["image", "series", "text", "words", "number", "category", "id"]

TARGETS = (
    "label", "labels", "target", "class", "category", "y", "answer", "output", "score", "rating",
    "stars", "sentiment", "topic", "tags", "future", "response", "completion", "summary",
)  # fmt: skip
SPLIT_COLUMNS = ("split", "fold", "subset", "partition")
PAIRS = (
    {"a", "b"}, {"text_a", "text_b"}, {"sentence1", "sentence2"}, {"sentence_1", "sentence_2"},
    {"premise", "hypothesis"}, {"question1", "question2"}, {"question", "sentence"},
    {"query", "passage"}, {"text1", "text2"}, {"first", "second"},
)  # fmt: skip
_IMAGE = {".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
_ID = re.compile(r"^(id|index|idx|uuid|guid|key|row|row_?id|.+_id|unnamed: 0)$", re.IGNORECASE)
MOST_CLASSES = 20  # distinct whole numbers that still look like classes


def column_kind(name: str, cells: Sequence[Any]) -> Kind | None:
    """What a column holds; None when all cells are missing."""
    values = [value for value in cells if not is_missing(value)]
    if not values:
        return None
    first = values[0]
    if isinstance(first, np.ndarray):
        return "image" if first.dtype == np.uint8 and first.ndim in (2, 3) else "series"
    if isinstance(first, bytes):
        return "image"
    if isinstance(first, list | tuple):
        return "words" if any(isinstance(v, str) for v in first) else "series"
    distinct = len({str(value) for value in values})
    if all(isinstance(value, bool | np.bool_) for value in values):
        return "category"
    if all(isinstance(value, int | float | np.number) for value in values):
        return "id" if _ID.match(name) and distinct == len(values) > 1 else "number"
    texts = [str(value) for value in values]
    if all(Path(text).suffix.lower() in _IMAGE for text in texts):
        return "image"
    words = float(np.mean([len(text.split()) for text in texts]))
    if words >= 3 or np.mean([len(text) for text in texts]) > 30:
        return "text"
    if distinct <= max(2, len(values) // 2):
        return "category"
    if words < 1.5 and distinct == len(values) and (_ID.match(name) or _coded(texts)):
        return "id"
    return "text"


def _coded(texts: Sequence[str]) -> bool:
    """Whether unique short strings look like codes: most hold a digit."""
    return float(np.mean([any(c.isdigit() for c in text) for text in texts])) > 0.9


def guess_target(config: TaskConfig, columns: Sequence[str], used: set[str]) -> str | None:
    """The column with the label by its name; None when none looks like one."""
    by_name = {column.lower(): column for column in columns if column not in used}
    return next((by_name[name] for name in TARGETS if name in by_name), None)


def guess_inputs(
    rows: Sequence[Row], columns: Sequence[str], leave_out: set[str], where: str
) -> InputsConfig:
    """Inputs of every modality that the columns hold, target and split column left out."""
    kinds: dict[str, Kind | None] = {
        column: column_kind(column, [row.get(column) for row in rows])
        for column in columns
        if column not in leave_out and column.lower() not in SPLIT_COLUMNS
    }
    by_kind: dict[str, list[str]] = {}
    for column, kind in kinds.items():
        if kind is not None:
            by_kind.setdefault(kind, []).append(column)
    table = [c for c in columns if kinds.get(c) in ("number", "category")]
    texts = by_kind.get("text", []) + by_kind.get("words", [])
    if not texts and not table and "image" not in by_kind and "series" not in by_kind:
        texts = by_kind.get("id", [])  # names, say: better than nothing to read
    given = {
        "text": tuple(texts) or None,
        "image": by_kind.get("image", [None])[0],
        "series": tuple(by_kind.get("series", ())) or None,
        "table": tuple(table) or None,
    }
    if not any(given.values()):
        raise TaskError(
            f"{where} has no column that could be an input beside the target "
            f"(has: {', '.join(columns)}). Name the inputs."
        )
    return InputsConfig(**given)


def guess_schema(
    config: TaskConfig, inputs: InputsConfig, labels: Sequence[Any], per_word: bool = False
) -> str:
    """The name of a schema for labels (a sample, missing ones left out).

    `per_word`: every label is a list as long as its row's words.
    """
    several = isinstance(config.target, tuple)
    if inputs.choices is not None:
        return "choice"
    if inputs.a is not None or inputs.b is not None:
        return "matching"
    if several:
        flags = all(_is_flag(v) for label in labels for v in label if not is_missing(v))
        return "multilabel" if flags else "regression"
    first = labels[0]
    if isinstance(first, np.ndarray | list | tuple):
        return "tagging" if per_word else _schema_of_lists(inputs, labels)
    kind = column_kind("", labels)
    if kind == "number":
        return _schema_of_numbers(config, inputs, labels)
    if kind in ("category", "words") or config.classes or config.verbaliser:
        return "pair" if is_pair(inputs) else "classification"
    distinct = {label_key(label) for label in labels}
    if len(distinct) <= MOST_CLASSES or len(distinct) <= len(labels) // 2:
        return "pair" if is_pair(inputs) else "classification"
    return "generation"


def _is_flag(value: Any) -> bool:
    return not isinstance(value, str) and float(value) in (0.0, 1.0)


def _schema_of_lists(inputs: InputsConfig, labels: Sequence[Any]) -> str:
    first = labels[0]
    if len(first) and isinstance(first[0], str):
        return "multilabel"
    if inputs.image is not None and np.ndim(first) == 2:
        return "dense"
    return "forecasting" if inputs.series is not None else "regression"


def _schema_of_numbers(config: TaskConfig, inputs: InputsConfig, labels: Sequence[Any]) -> str:
    whole = all(float(label).is_integer() for label in labels)
    distinct = {float(label) for label in labels}
    few = len(distinct) <= min(MOST_CLASSES, max(2, len(labels) // 2))
    if config.classes or config.verbaliser or (whole and few):
        return "pair" if is_pair(inputs) else "classification"
    return "regression"


def is_pair(inputs: InputsConfig) -> bool:
    """Whether two text columns are the two sides of a pair, by their names."""
    return {name.lower() for name in as_columns(inputs.text)} in [set(pair) for pair in PAIRS]
