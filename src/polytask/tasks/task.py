"""What is to be learned: `Task`, and `RowGroup` for tasks that label the same rows.

A task is data, not a subclass: a name, splits of rows, how a row becomes inputs and a target, a
schema that knows the target's type, its default head, objective and metrics, and facets that a
policy or an analysis groups by.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from polytask.data.rows import RowSource, StreamSource

if TYPE_CHECKING:
    from polytask.tasks.schemas import Schema

Modality = Literal["text", "image", "series", "table", "features"]
MODALITIES: tuple[Modality, ...] = ("text", "image", "series", "table", "features")


@dataclass(frozen=True)
class Field:
    """One input of a task: the column (several for a table) and its modality.

    `template` (text only) renders the row: 'Question: {question} Answer:'; slots are columns.
    `slot` tells apart the two sides of pair, choice and matching tasks ('a', 'b', 'choices').
    """

    modality: Modality
    columns: tuple[str, ...]
    template: str | None = None
    slot: str = "main"


@dataclass(frozen=True)
class Task:
    """One thing to learn. `splits` has 'train', and 'valid' and 'test' where evaluated."""

    name: str
    schema: Schema
    splits: Mapping[str, RowSource | StreamSource]
    inputs: tuple[Field, ...]
    target: str | None  # column with the label; None where the target is the input (LM, matching)
    facets: Mapping[str, str] = field(default_factory=dict)
    metrics: tuple[str, ...] = ()  # names; empty: the schema's defaults
    options: Mapping[str, Any] = field(default_factory=dict)


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

    @property
    def tasks(self) -> tuple[Task, ...]:
        return tuple(task for group in self.groups for task in group.tasks)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.tasks)
