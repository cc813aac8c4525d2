"""Schemas whose label is text: generation, and language modelling, where the input is the label."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from polytask.errors import suggestion
from polytask.tasks.schemas.base import SCHEMAS, Schema, Words, brief, is_missing, label_key


def read_text(value: Any, what: str) -> str:
    """The text in a cell; numbers are written out, anything else is refused."""
    if is_missing(value):
        raise ValueError(f"the {what} is missing")
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float | np.number | np.bool_):
        return label_key(value)
    raise ValueError(f"the {what} should be text, not a {type(value).__name__}")


@SCHEMAS.register("generation")
@dataclass(frozen=True)
class Generation(Schema):
    """A text to write after the prompt. With a `verbaliser`, raw labels become its words, and a
    label outside it is refused: classification by writing."""

    kind: ClassVar[str] = "generation"
    head: ClassVar[str] = "generate"
    metrics: ClassVar[tuple[str, ...]] = ("exact_match", "token_f1")
    primary: ClassVar[str] = "exact_match"

    verbaliser: Words = ()

    @cached_property
    def _words(self) -> dict[str, str]:
        words = {word: word for _, word in self.verbaliser}
        return words | {label_key(raw): word for raw, word in self.verbaliser}

    def read(self, value: Any) -> str:
        text = read_text(value, "target text")
        if not self.verbaliser:
            return text
        word = self._words.get(label_key(value))
        if word is None:
            raise ValueError(
                f"label {brief(value)} is outside the verbaliser.{suggestion(text, self._words)}"
            )
        return word

    def show(self, prediction: Any) -> str:
        return str(prediction)


@SCHEMAS.register("language_model")
@dataclass(frozen=True)
class LanguageModel(Schema):
    """The next token at every position: the text is its own label."""

    kind: ClassVar[str] = "language_model"
    head: ClassVar[str] = "generate"
    metrics: ClassVar[tuple[str, ...]] = ("perplexity",)
    primary: ClassVar[str] = "perplexity"
    higher_is_better: ClassVar[bool] = False

    def read(self, value: Any) -> str:
        return read_text(value, "text")

    def show(self, prediction: Any) -> str:
        return str(prediction)
