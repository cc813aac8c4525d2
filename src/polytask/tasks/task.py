"""What is to be learned: `Task`, and `RowGroup` for tasks that label the same rows.

A task is data, not a subclass: a name, splits of rows, how a row becomes inputs and a target, a
schema that knows the target's type, its default head, objective and metrics, and facets that a
policy or an analysis groups by.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from polytask.data.rows import Row, RowSource, StreamSource
from polytask.errors import TaskError, suggestion
from polytask.tasks.schemas import Forecasting, Schema, is_missing

Modality = Literal["text", "image", "series", "table", "features"]
MODALITIES: tuple[Modality, ...] = ("text", "image", "series", "table", "features")


@dataclass(frozen=True)
class Field:
    """One input of a task: the column (several for a table) and its modality.

    `template` (text only) renders the row: 'Question: {question} Answer:'; slots are columns.
    `alternatives` are further templates: training draws one per (epoch, row), evaluation scores
    each. `slot` tells apart the two sides of pair, choice and matching tasks ('a', 'b', 'choices').
    """

    modality: Modality
    columns: tuple[str, ...]
    template: str | None = None
    slot: str = "main"
    alternatives: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """One thing to learn. `splits` has 'train', and 'valid' and 'test' where evaluated."""

    name: str
    schema: Schema
    splits: Mapping[str, RowSource | StreamSource]
    inputs: tuple[Field, ...]
    # Column with the label; several for labels spread over columns (multi-label, regression,
    # forecasting); None where the target is the input (language modelling, matching).
    target: str | tuple[str, ...] | None
    facets: Mapping[str, str] = field(default_factory=dict)
    metrics: tuple[str, ...] = ()  # names; empty: the schema's defaults
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_rows(cls, name: str, rows: Any, seed: int = 0, **config: Any) -> Task:
        """A task from rows in memory: a list of mappings, a data frame, any row source.

        `config` as in `TaskConfig` (schema, inputs, target, template, classes, split, ...); what
        is left out is guessed.

        >>> rows = [{"text": f"film no. {i}", "label": ("good", "bad")[i % 2]} for i in range(40)]
        >>> Task.from_rows("reviews", rows, target="label").schema.classes
        ('bad', 'good')
        """
        from polytask.tasks.build import build_tasks

        return build_tasks({name: {"data": rows, **config}}, seed=seed).tasks[0]

    @property
    def target_columns(self) -> tuple[str, ...]:
        """The label's columns; empty where the input is the label."""
        if self.target is None:
            return ()
        return (self.target,) if isinstance(self.target, str) else self.target

    def raw_label(self, row: Row) -> Any:
        """What a row holds as this task's label, unread; None where it holds none.

        Labels spread over columns come as a list, or None when every one of them is missing.
        """
        columns = self.target_columns
        if len(columns) == 1:
            return row.get(columns[0])
        values = [row.get(column) for column in columns]
        if all(is_missing(value) for value in values):
            return None
        # Futures of several channels: (steps, channels), as one column would hold them.
        return list(zip(*values)) if isinstance(self.schema, Forecasting) else values


@dataclass(frozen=True)
class RowGroup:
    """Tasks that read the same inputs of the same rows: the trunk runs once for all of them.

    A mixture draws rows from groups; a group of one task is the common case.
    """

    name: str
    tasks: tuple[Task, ...]

    @property
    def splits(self) -> Mapping[str, RowSource | StreamSource]:
        return self.tasks[0].splits

    @property
    def inputs(self) -> tuple[Field, ...]:
        return self.tasks[0].inputs


@dataclass(frozen=True)
class TaskSet:
    """All tasks of a run. A task's id is its index in `tasks`, a group's its index in `groups`."""

    groups: tuple[RowGroup, ...]
    notes: tuple[str, ...] = ()  # what building found worth saying: bad rows left out, duplicates

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for name in self.names:
            if name in seen:
                raise TaskError(f"two tasks are named '{name}'; give each its own name")
            seen.add(name)

    @classmethod
    def of(cls, *tasks: Task) -> TaskSet:
        """Tasks made one by one, each a group of its own."""
        return cls(tuple(RowGroup(task.name, (task,)) for task in tasks))

    @cached_property
    def tasks(self) -> tuple[Task, ...]:
        return tuple(task for group in self.groups for task in group.tasks)

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.tasks)

    @cached_property
    def group_of(self) -> tuple[int, ...]:
        """The group id of each task id."""
        return tuple(g for g, group in enumerate(self.groups) for _ in group.tasks)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}

    def task_id(self, name: str) -> int:
        """The id of the task of that name; `TaskError` with the nearest name when there is none."""
        if name not in self._ids:
            raise TaskError(f"there is no task '{name}'.{suggestion(name, self.names)}")
        return self._ids[name]
