"""Schemas whose labels are classes: one, several, per pair, per candidate, per token."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from polytask.errors import suggestion
from polytask.tasks.schemas.base import (
    SCHEMAS,
    Schema,
    Words,
    brief,
    check_classes,
    class_index,
    is_missing,
    label_key,
    read_class,
)

_SEPARATORS = re.compile(r"\s*[;|,]\s*")


@SCHEMAS.register("classification")
@dataclass(frozen=True)
class Classification(Schema):
    """One of `classes`. `verbaliser` maps raw labels to class names: (('0', 'negative'), ...)."""

    kind: ClassVar[str] = "classification"
    head: ClassVar[str] = "classify"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "macro_f1")
    primary: ClassVar[str] = "accuracy"

    classes: tuple[str, ...]
    verbaliser: Words = ()

    def __post_init__(self) -> None:
        check_classes(self.classes, self.verbaliser)

    @cached_property
    def _index(self) -> dict[str, int]:
        return class_index(self.classes, self.verbaliser)

    def read(self, value: Any) -> int:
        return read_class(value, self._index)

    def show(self, prediction: Any) -> str:
        return self.classes[int(prediction)]


@SCHEMAS.register("pair")
@dataclass(frozen=True)
class Pair(Classification):
    """One of `classes` for two texts read together ('[START] a [SEP] b')."""

    kind: ClassVar[str] = "pair"


@SCHEMAS.register("multilabel")
@dataclass(frozen=True)
class MultiLabel(Schema):
    """Any number of `classes`. A cell is a list of labels, a string 'a; b', or a 0/1 vector.

    A vector may hold NaN for labels nobody gave.
    """

    kind: ClassVar[str] = "multilabel"
    head: ClassVar[str] = "multilabel"
    metrics: ClassVar[tuple[str, ...]] = ("macro_f1", "micro_f1", "mean_average_precision")
    primary: ClassVar[str] = "macro_f1"

    classes: tuple[str, ...]
    verbaliser: Words = ()

    def __post_init__(self) -> None:
        check_classes(self.classes, self.verbaliser)

    @cached_property
    def _index(self) -> dict[str, int]:
        return class_index(self.classes, self.verbaliser)

    def read(self, value: Any) -> npt.NDArray[np.float32]:
        """(classes,) float32: 1 present, 0 absent, NaN unknown."""
        if is_missing(value):
            raise ValueError("the labels are missing")
        if self._is_vector(value):
            vector = np.array([np.nan if v is None else v for v in value], np.float32)
            if np.isnan(vector).all():
                raise ValueError("the labels are missing")
            return vector
        result = np.zeros(len(self.classes), np.float32)
        for item in split_labels(value):
            result[read_class(item, self._index)] = 1
        return result

    def _is_vector(self, value: Any) -> bool:
        if isinstance(value, str | bytes) or not hasattr(value, "__len__"):
            return False
        if len(value) != len(self.classes) or isinstance(value, set | frozenset | dict):
            return False
        return all(
            v is None or (not isinstance(v, str) and (is_missing(v) or float(v) in (0.0, 1.0)))
            for v in value
        )

    def show(self, prediction: Any) -> list[str]:
        chosen = np.asarray(prediction) > 0.5
        return [name for name, yes in zip(self.classes, chosen, strict=True) if yes]


@SCHEMAS.register("choice")
@dataclass(frozen=True)
class Choice(Schema):
    """The right one of several candidates, which differ from row to row.

    The label is the candidate's position (a number, from 0), its letter ('A' the first), or its
    text; a string that is some candidate's text means that candidate.
    """

    kind: ClassVar[str] = "choice"
    head: ClassVar[str] = "choice"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)
    primary: ClassVar[str] = "accuracy"

    choices_column: str = "choices"

    def read(self, value: Any) -> int | str:
        """A position, or the text to look for among the candidates (`resolve`)."""
        if is_missing(value):
            raise ValueError("the answer is missing")
        if isinstance(value, list | tuple | dict | set | np.ndarray):
            raise ValueError(f"an answer should be one value, not a {type(value).__name__}")
        key = label_key(value)
        return key if isinstance(value, str) else int(key) if key.isdigit() else key

    def resolve(self, value: Any, candidates: Sequence[str]) -> int:
        """The position of the answer among this row's candidates."""
        answer = self.read(value)
        names = [label_key(c) for c in candidates]
        if isinstance(answer, str):
            if answer in names:
                return names.index(answer)
            if len(answer) == 1 and answer.isalpha() and answer.isascii():
                answer = ord(answer.upper()) - ord("A")
            elif answer.isdigit():
                answer = int(answer)
            else:
                raise ValueError(
                    f"answer {brief(value)} is not among the candidates.{suggestion(answer, names)}"
                )
        elif str(answer) in names and names.index(str(answer)) != answer:
            raise ValueError(
                f"answer {answer} is both a position and the text of another candidate; "
                "write the position as a letter (A, B, ...)"
            )
        if not 0 <= answer < len(names):
            raise ValueError(f"answer {brief(value)} points past the {len(names)} candidates")
        return answer

    def show(self, prediction: Any) -> int:
        return int(prediction)


@SCHEMAS.register("tagging")
@dataclass(frozen=True)
class Tagging(Schema):
    """One of `classes` for every word. Words and tags are lists, or strings split at spaces."""

    kind: ClassVar[str] = "tagging"
    head: ClassVar[str] = "tag"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "macro_f1")
    primary: ClassVar[str] = "accuracy"

    classes: tuple[str, ...]
    verbaliser: Words = ()

    def __post_init__(self) -> None:
        check_classes(self.classes, self.verbaliser)

    @cached_property
    def _index(self) -> dict[str, int]:
        return class_index(self.classes, self.verbaliser)

    def read(self, value: Any) -> npt.NDArray[np.int32]:
        """(words,) int32; a word without a tag (None) is -100."""
        if is_missing(value):
            raise ValueError("the tags are missing")
        tags = words_of(value)
        if not tags:
            raise ValueError("the list of tags is empty")
        return np.array(
            [-100 if is_missing(tag) else read_class(tag, self._index) for tag in tags], np.int32
        )

    def show(self, prediction: Any) -> list[str]:
        return [self.classes[int(tag)] for tag in np.asarray(prediction).ravel() if tag >= 0]


def split_labels(value: Any) -> list[Any]:
    """The labels in a multi-label cell: a list, or a string with ';', '|' or ',' between them."""
    if isinstance(value, str):
        return [part for part in _SEPARATORS.split(value.strip()) if part]
    if isinstance(value, list | tuple | set | frozenset | np.ndarray):
        return [item for item in value if not is_missing(item)]
    return [value]


def words_of(value: Any) -> list[Any]:
    """The words (or tags) in a cell: a list as it is, a string split at white space."""
    if isinstance(value, str):
        return list(value.split())
    if isinstance(value, list | tuple | np.ndarray):
        return list(value)
    raise ValueError(f"expected a list or a string of words, not a {type(value).__name__}")
