"""How a group's rows become sequences: which of six layouts, which fields, which statistics.

A layout holds everything about a group that encoding needs and nothing of where its rows came
from; it is saved with the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

from polytask.rng import derive
from polytask.tasks.schemas import (
    Choice,
    Generation,
    LanguageModel,
    Matching,
    Schema,
    Tagging,
    schema_from_json,
)
from polytask.tasks.tables import TableCodec
from polytask.tasks.task import Field, Task
from polytask.tasks.templates import Template

Mode = Literal["plain", "words", "choice", "match", "generate", "language"]

# Tasks with these schemas read sequences of a shape of their own; all others share one sequence.
_OWN: tuple[tuple[type[Schema], Mode], ...] = (
    (Choice, "choice"),
    (Matching, "match"),
    (Generation, "generate"),
    (LanguageModel, "language"),
)


def mode_of(schema: type[Schema]) -> Mode:
    """The layout that tasks of this schema ask for; 'words' and 'plain' tasks can share rows."""
    if issubclass(schema, Tagging):
        return "words"
    return next((mode for kind, mode in _OWN if issubclass(schema, kind)), "plain")


@dataclass(frozen=True)
class GroupLayout:
    """A group's tasks (without rows), inputs, and what was learned about them."""

    name: str
    tasks: tuple[Task, ...]
    first_id: int  # task id of tasks[0]; the others follow
    mode: Mode
    tables: Mapping[str, TableCodec] = field(default_factory=dict)  # slot -> columns
    feature_width: int = 0
    series_channels: int = 0
    answer_room: int = 0  # tokens of the longest answer, its [END] included

    @property
    def inputs(self) -> tuple[Field, ...]:
        return self.tasks[0].inputs

    @cached_property
    def texts(self) -> tuple[tuple[Field, tuple[Template, ...]], ...]:
        """The text fields with their parsed templates."""
        return tuple(
            (f, tuple(Template.parse(t) for t in (f.template, *f.alternatives) if t is not None))
            for f in self.inputs
            if f.modality == "text"
        )

    @cached_property
    def templates(self) -> int:
        """The most templates a field has; at least 1."""
        return max((len(templates) for _, templates in self.texts), default=1) or 1

    def choose(
        self, template: int, rows: Sequence[int], epochs: Sequence[int] | int | None, seed: int
    ) -> list[int]:
        """The template of each row: the given one, or a draw from (seed, group, epoch, row)."""
        count = self.templates
        if epochs is None or count == 1:
            return [template % count] * len(rows)
        each = [epochs] * len(rows) if isinstance(epochs, int) else list(epochs)
        return [
            derive(seed, "template", self.name, int(epoch), row) % count
            for epoch, row in zip(each, rows, strict=True)
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "first_id": self.first_id,
            "mode": self.mode,
            "inputs": [asdict(f) for f in self.inputs],
            "tasks": [_task_json(task) for task in self.tasks],
            "tables": {slot: table.to_json() for slot, table in self.tables.items()},
            "feature_width": self.feature_width,
            "series_channels": self.series_channels,
            "answer_room": self.answer_room,
        }


def layout_from_json(data: Mapping[str, Any]) -> GroupLayout:
    """The layout that `to_json` wrote."""
    inputs = tuple(
        Field(
            f["modality"], tuple(f["columns"]), f["template"], f["slot"], tuple(f["alternatives"])
        )
        for f in data["inputs"]
    )
    return GroupLayout(
        name=data["name"],
        tasks=tuple(_task_of(item, inputs) for item in data["tasks"]),
        first_id=data["first_id"],
        mode=data["mode"],
        tables={slot: TableCodec.from_json(item) for slot, item in data["tables"].items()},
        feature_width=data["feature_width"],
        series_channels=data["series_channels"],
        answer_room=data["answer_room"],
    )


def _task_json(task: Task) -> dict[str, Any]:
    return {
        "name": task.name,
        "schema": task.schema.to_json(),
        "target": task.target,
        "facets": dict(task.facets),
        "metrics": list(task.metrics),
        "options": dict(task.options),
    }


def _task_of(data: Mapping[str, Any], inputs: tuple[Field, ...]) -> Task:
    target = data["target"]
    return Task(
        name=data["name"],
        schema=schema_from_json(data["schema"]),
        splits={},
        inputs=inputs,
        target=tuple(target) if isinstance(target, list) else target,
        facets=data["facets"],
        metrics=tuple(data["metrics"]),
        options=data["options"],
    )
