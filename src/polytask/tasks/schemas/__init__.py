"""The eleven kinds of label a task can have, by the names that configurations use."""

from polytask.tasks.schemas.base import (
    SCHEMAS,
    Schema,
    Words,
    brief,
    is_missing,
    label_key,
    schema_from_json,
)
from polytask.tasks.schemas.classes import (
    Choice,
    Classification,
    MultiLabel,
    Pair,
    Tagging,
    split_labels,
    words_of,
)
from polytask.tasks.schemas.texts import Generation, LanguageModel, read_text
from polytask.tasks.schemas.values import Dense, Forecasting, Matching, Regression, numbers

__all__ = [
    "SCHEMAS",
    "Choice",
    "Classification",
    "Dense",
    "Forecasting",
    "Generation",
    "LanguageModel",
    "Matching",
    "MultiLabel",
    "Pair",
    "Regression",
    "Schema",
    "Tagging",
    "Words",
    "brief",
    "is_missing",
    "label_key",
    "numbers",
    "read_text",
    "schema_from_json",
    "split_labels",
    "words_of",
]
