"""`TaskConfig`: a task said in a few lines of YAML; what is left out is guessed from the data.

tasks:
  reviews: {data: reviews.csv, target: stars}
  topics:
    data: news.csv
    template: "Headline: {title} Body: {body}"
    target: section
    verbaliser: {1: world, 2: sports}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from polytask.configs import Config
from polytask.tasks.schemas import label_key

Columns = str | tuple[str, ...]
SplitKind = Literal["given", "random", "group", "time"]


class SplitConfig(Config):
    """Which rows are for training (train), for choosing (valid) and for judging (test).

    given: by the data (files per split, or a column `by` with split names). random: by a hash of
    each row's inputs, so the split does not depend on the order of rows, equal rows are never in
    two splits, and classes keep their shares. group: all rows with one value of `by` stay
    together. time: the latest by `by` (the last rows without it) are test, those before valid.
    """

    kind: SplitKind | None = None
    """None: 'given' where the data has splits (missing ones are cut from train), else 'random'."""
    valid: float = Field(default=0.1, ge=0, lt=1)
    test: float = Field(default=0.2, ge=0, lt=1)
    by: str | None = None
    """Column with the group, the time, or the split's name."""
    seed: int | None = None
    """The run's seed when None."""
    held_out_rows: int = Field(default=1000, ge=1)
    """Streams only: rows of valid and of test that are held in memory."""

    @model_validator(mode="after")
    def _complete(self) -> SplitConfig:
        if self.valid + self.test >= 1:
            raise ValueError(f"valid + test = {self.valid + self.test:g} leaves nothing for train")
        if self.kind == "group" and self.by is None:
            raise ValueError("a split by group needs 'by': the column that names the group")
        return self


class InputsConfig(Config):
    """Columns by modality. Several columns of text go into one text (see `template`)."""

    text: Columns | None = None
    image: str | None = None
    series: Columns | None = None
    table: Columns | None = None
    features: str | None = None
    choices: Columns | None = None
    """Multiple choice: a column with a list of candidates, or one column each."""
    a: InputsConfig | None = None
    b: InputsConfig | None = None
    """The two sides of matching, where each may be of any modality."""


class TaskConfig(Config):
    """One task. Only `data` is needed where the rest can be guessed."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    data: Any
    """A `DataSpec` (path, 'hub:ID', 'embedded:NAME', mapping), or {train: ..., test: ...}; from
    Python also a row source, a list of rows or a data frame."""
    kind: str | None = Field(default=None, alias="schema")
    """Name of the schema ('classification', ...); guessed from the target column when None."""
    inputs: InputsConfig | None = None
    """Guessed from the columns when None."""
    template: Columns | None = None
    """Text with columns in braces; several: training draws one per row, evaluation scores each."""
    target: Columns | None = None
    """Column with the label; several for one label column per class or output."""
    classes: tuple[str, ...] | None = None
    """Class names in order; all labels that occur when None."""
    verbaliser: Mapping[str, str] | None = None
    """Raw label -> word; a label outside it is an error."""
    split: SplitConfig = SplitConfig()
    metrics: tuple[str, ...] = ()
    facets: Mapping[str, str] = Field(default_factory=dict)
    weight: float = Field(default=1.0, ge=0)
    """Weight in the mixture, where its policy uses given weights."""
    max_bad: float = Field(default=0.01, ge=0, lt=1)
    """Share of rows that may be unusable; they are counted, shown and left out."""
    max_cell: int = Field(default=1_000_000, ge=1)
    """Characters that one text cell may have."""
    share_rows: bool = True
    """Let tasks with the same data, inputs and split share rows, so the trunk runs once."""
    categories: tuple[str, ...] = ()
    """Table columns that are categories although their values are numbers."""
    horizon: int | None = Field(default=None, ge=1)
    """Forecasting: steps to predict."""
    context: int | None = Field(default=None, ge=1)
    """Forecasting windows cut from long series: steps before the horizon that a window has.
    Language modelling: words of a passage; longer texts become several rows."""
    stride: int = Field(default=1, ge=1)
    """Forecasting windows: steps from one training window to the next."""
    temperature: float = Field(default=0.07, gt=0)
    """Matching: where the temperature starts."""
    height: int | None = Field(default=None, ge=1)
    width: int | None = Field(default=None, ge=1)
    """Dense prediction: size of the label grid; the first map's size, at most 64, when None."""

    @field_validator("classes", mode="before")
    @classmethod
    def _class_names(cls, value: Any) -> Any:
        return tuple(label_key(v) for v in value) if isinstance(value, list | tuple) else value

    @field_validator("verbaliser", mode="before")
    @classmethod
    def _verbaliser_words(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {label_key(raw): label_key(word) for raw, word in value.items()}
        return value


def as_columns(value: Columns | None) -> tuple[str, ...]:
    """One column or several, as a tuple."""
    return () if value is None else (value,) if isinstance(value, str) else value
