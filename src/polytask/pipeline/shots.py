"""Few-shot training rows: k per class, drawn once, the same for every method of a seed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from polytask import rng
from polytask.data.rows import RowSource, View
from polytask.errors import ConfigError, DataError
from polytask.tasks import RowGroup, TaskSet
from polytask.tasks.task import Task


def few_shots(taskset: TaskSet, shots: int, seed: int) -> TaskSet:
    """The same tasks with `shots` training rows for each class, or `shots` altogether where labels
    are no classes. Other splits stay whole.

    Raises:
        ConfigError: training rows are a stream.
        DataError: a class has fewer rows than asked for.
    """
    groups = []
    for group in taskset.groups:
        source = group.splits["train"]
        if not isinstance(source, RowSource):
            raise ConfigError(f"'shots' needs rows in a file, and {group.name} is a stream")
        kept = View(source, _chosen(group, source, shots, seed))
        splits = {**group.splits, "train": kept}
        tasks = tuple(replace(task, splits=splits) for task in group.tasks)
        groups.append(RowGroup(group.name, tasks))
    return TaskSet(tuple(groups), taskset.notes)


def _chosen(group: RowGroup, source: RowSource, shots: int, seed: int) -> Any:
    order = rng.generator(seed, "shots", group.name).permutation(len(source))
    schema: Any = group.tasks[0].schema
    if schema.head != "classify":
        if len(order) < shots:
            raise DataError(f"'{group.name}' has {len(order)} training rows, {shots} are asked for")
        return np.sort(order[:shots])
    found: dict[str, list[int]] = {str(name): [] for name in schema.classes}
    for start in range(0, len(order), 512):
        part = order[start : start + 512]
        for index, row in zip(part, source.take([int(i) for i in part]), strict=True):
            name = _class_of(group.tasks[0], row)
            if name is not None and len(found[name]) < shots:
                found[name].append(int(index))
        if all(len(rows) == shots for rows in found.values()):
            break
    for name, rows in found.items():
        if len(rows) < shots:
            raise DataError(
                f"task '{group.tasks[0].name}': class '{name}' has {len(rows)} training rows, "
                f"{shots} are asked for ('shots')"
            )
    return np.sort(np.concatenate([np.asarray(rows, np.int64) for rows in found.values()]))


def _class_of(task: Task, row: Any) -> str | None:
    """The class a row is labelled with; None where the label is missing or unreadable."""
    value = task.raw_label(row)
    if value is None or value == "":
        return None
    try:
        number: Any = task.schema.read(value)
    except ValueError:
        return None
    names: Any = task.schema
    return str(names.classes[int(number)])
