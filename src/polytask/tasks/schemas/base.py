"""What every schema shares: the type of a label, how a raw cell becomes one, and what counts.

A schema is a frozen record. It knows its default head, its default metrics, how to validate one
raw label (`read`) and how to say a prediction in the user's own terms (`show`). It goes into
checkpoints as JSON (`to_json`, `schema_from_json`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np

from polytask.errors import suggestion
from polytask.registry import Registry

Words = tuple[tuple[str, str], ...]  # (raw label, word) pairs: a verbaliser


@dataclasses.dataclass(frozen=True)
class Schema:
    """The type of a task's labels. Subclasses say what a label is and which head predicts it."""

    kind: ClassVar[str]
    head: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]]
    primary: ClassVar[str]
    higher_is_better: ClassVar[bool] = True

    def read(self, value: Any) -> Any:
        """The label in a raw cell; `ValueError` with the reason when there is none."""
        raise ValueError(f"a {self.kind} task reads no labels")

    def show(self, prediction: Any) -> Any:
        """A prediction in the user's terms, ready for JSON."""
        return np.asarray(prediction).tolist()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values with the schema's kind; `schema_from_json` gives the same schema."""
        return {"kind": self.kind, **dataclasses.asdict(self)}


SCHEMAS: Registry[type[Schema]] = Registry("schema")


def schema_from_json(data: Mapping[str, Any]) -> Schema:
    """The schema that `to_json` wrote."""
    fields = {key: _tuples(value) for key, value in data.items() if key != "kind"}
    return SCHEMAS.get(str(data["kind"]))(**fields)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value


def is_missing(value: Any) -> bool:
    """Whether a cell holds no label at all: None, NaN, NaT, an empty or blank string."""
    if value is None:
        return True
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, float | np.floating):
        return math.isnan(value)
    if isinstance(value, np.ndarray) and value.ndim == 0:
        return is_missing(value.item())
    return type(value).__name__ in ("NaTType", "NAType")


def label_key(value: Any) -> str:
    """The text that identifies a raw label, the same whichever way a file spelt its type.

    1, 1.0, '1' and numpy's 1 are one label; true, True and 'TRUE' are one label.
    """
    if isinstance(value, bool | np.bool_):
        return "true" if value else "false"
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    text = str(value).strip()
    if text in ("True", "TRUE", "False", "FALSE"):
        return text.lower()
    return text


def read_class(value: Any, index: Mapping[str, int]) -> int:
    """The class number of a raw label; `index` maps label keys to numbers."""
    if is_missing(value):
        raise ValueError("the label is missing")
    if isinstance(value, list | tuple | dict | set | np.ndarray):
        raise ValueError(f"a label should be one value, not a {type(value).__name__}")
    key = label_key(value)
    found = index.get(key)
    if found is None:
        raise ValueError(
            f"label {brief(value)} is outside the task's classes.{suggestion(key, index)}"
        )
    return found


def class_index(classes: Iterable[str], words: Words) -> dict[str, int]:
    """Label key -> class number, for raw labels of the verbaliser and for the words themselves."""
    numbers = {label_key(name): number for number, name in enumerate(classes)}
    for raw, word in words:
        numbers[label_key(raw)] = numbers[label_key(word)]
    return numbers


def check_classes(classes: tuple[str, ...], words: Words) -> None:
    """Refuse repeated classes and words that are not among them."""
    keys = [label_key(name) for name in classes]
    twice = (
        sorted({key for key in keys if keys.count(key) > 1}) if len(set(keys)) < len(keys) else []
    )
    if twice:
        raise ValueError(f"class '{twice[0]}' is given twice")
    known = set(keys)
    for raw, word in words:
        if label_key(word) not in known:
            raise ValueError(f"verbaliser maps '{raw}' to '{word}', which is not a class")


def brief(value: Any, limit: int = 60) -> str:
    """A value short enough for a message."""
    text = repr(value) if isinstance(value, str) else str(value)
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
