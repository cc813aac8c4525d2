"""Answers in the user's own terms for rows of data: class names, numbers in raw units, text.

A `Predictor` needs a model and the processor it was trained with, and no training data. Rows are
taken in batches; rows of equal modality cost the same whichever tasks they are for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from polytask.data.rows import Row
from polytask.models.collate import Collator
from polytask.models.multitask import MultitaskModel
from polytask.tasks.encode import Processor
from polytask.tasks.layouts import GroupLayout
from polytask.tasks.schemas import Classification, MultiLabel, Schema, Tagging, words_of

Array = npt.NDArray[Any]
Answer = dict[str, Any]


class Predictor:
    """Predicts any of a model's tasks.

    Args:
        model: trained on the tasks of `processor`.
        processor: as it was fitted for training.
        batch_size: rows per forward pass.
    """

    def __init__(self, model: MultitaskModel, processor: Processor, batch_size: int = 64) -> None:
        self.model = model.eval()
        self.processor = processor
        self.batch_size = batch_size
        layouts = processor.layouts
        kinds = [task.schema.head for layout in layouts for task in layout.tasks]
        groups = [range(layout.first_id, layout.first_id + len(layout.tasks)) for layout in layouts]
        self._collate = Collator(kinds, groups, processor.pad_id)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks it can answer."""
        return tuple(task.name for layout in self.processor.layouts for task in layout.tasks)

    def predict(self, task: str, rows: Sequence[Row], template: int = 0) -> list[Answer]:
        """One answer per row, in order; see `answer_of` for what it holds.

        Raises:
            TaskError: there is no such task (the nearest name is given).
            DataError: a row lacks an input column, or a cell cannot be used.
        """
        return list(self.stream(task, rows, template))

    def stream(self, task: str, rows: Sequence[Row], template: int = 0) -> Iterator[Answer]:
        """`predict`, batch by batch, for rows that do not fit in memory."""
        group = self.processor.group_of(task)
        layout = self.processor.layouts[group]
        number = [t.name for t in layout.tasks].index(task)
        schema = layout.tasks[number].schema
        done, source = 0, iter(rows)
        while batch := list(islice(source, self.batch_size)):
            start = done

            def where(i: int, start: int = start) -> str:
                return f"row {start + i + 1}"

            values = self._values(group, layout.first_id + number, schema, batch, where, template)
            for row, value in zip(batch, values, strict=True):
                yield self._answer(layout, schema, row, value)
            done += len(batch)

    def _values(
        self, group: int, task_id: int, schema: Schema, rows: list[Row], where: Any, template: int
    ) -> Array:
        examples = self.processor.encode(group, rows, where, template=template, with_targets=False)
        batch = self._collate(examples, [group] * len(examples), unlabelled=True)
        found = self.model.predict(batch)[schema.head]
        chosen = np.flatnonzero(found.task == task_id)
        order = chosen[np.argsort(found.row[chosen], kind="stable")]
        values: Array = found.value[order]
        return values

    def _answer(self, layout: GroupLayout, schema: Schema, row: Row, value: Array) -> Answer:
        if isinstance(schema, Tagging):
            return self._tags(layout, schema, row, value)
        if schema.head == "generate":
            return {"prediction": self.processor.decode(value.tolist())}
        return answer_of(schema, value)

    def _tags(self, layout: GroupLayout, schema: Tagging, row: Row, value: Array) -> Answer:
        """One tag per word; None for words beyond the model's text length."""
        (text, _), *_ = layout.texts
        words = [str(word) for word in words_of(row[text.columns[0]])]
        ((_, owner),) = self.processor.codec.encode_words([words])
        place = np.flatnonzero(np.diff(np.asarray(owner, np.int64), prepend=-1))
        first = len(self.processor.codec.start) + place
        tags = [
            schema.classes[int(value[i])] if i < len(value) and value[i] >= 0 else None
            for i in first
        ]
        return {"prediction": tags + [None] * (len(words) - len(tags))}


def answer_of(schema: Schema, value: Array) -> Answer:
    """A model's prediction for one row, as values that JSON and CSV can hold.

    Classification: `prediction` (class), `probability`. Multi-label: `prediction` (classes above
    0.5), `probabilities` by class. Choice: `prediction` (position), `probability`. Matching:
    `prediction` (cosine similarity of the two sides). Others: `prediction` in raw units.
    """
    if isinstance(schema, Classification):
        best = int(value[: len(schema.classes)].argmax())
        return {"prediction": schema.show(best), "probability": float(value[best])}
    if isinstance(schema, MultiLabel):
        own = value[: len(schema.classes)]
        named = {name: float(p) for name, p in zip(schema.classes, own, strict=True)}
        return {"prediction": schema.show(own), "probabilities": named}
    if schema.head == "choice":
        best = int(value.argmax())
        return {"prediction": best, "probability": float(value[best])}
    if schema.head == "match":
        return {"prediction": float(value[0] @ value[1])}
    if schema.head == "regress":
        return {"prediction": schema.show(value[np.isfinite(value)])}
    if schema.head == "forecast":
        horizon, channels = int(getattr(schema, "horizon", 0)), int(getattr(schema, "channels", 1))
        steps = value[:horizon, :channels]
        return {"prediction": (steps[:, 0] if channels == 1 else steps).tolist()}
    height, width = int(getattr(schema, "height", 0)), int(getattr(schema, "width", 0))
    return {"prediction": value[:height, :width].tolist()}
