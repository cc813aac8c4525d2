"""`evaluate`: every labelled row of a split once, each task by its metrics.

    for group in task set:
        for batch of rows of the split, in an order that depends on nothing but the rows:
            part = metrics' summands of model.predict(batch)    # replayed if on file
        join the parts -> value, per-example scores

Deterministic: the same model and rows give the same bytes, interrupted or not, because batches are
cut the same way. Rows are encoded in chunks and batched by length within a chunk (less padding).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from polytask.data.rows import Row, RowSource
from polytask.errors import TaskError, suggestion
from polytask.evaluate.cases import TEXT_METRICS, cases_of
from polytask.evaluate.match import match_part
from polytask.evaluate.metric import Metric, find_metric
from polytask.evaluate.parts import Part, PartsFile, fingerprint, joined, part_of
from polytask.evaluate.scored import TaskScore, primary_of
from polytask.tasks.task import RowGroup, Task, TaskSet

if TYPE_CHECKING:
    import torch

CHUNK_BATCHES = 16  # batches encoded together and sorted by length


def evaluate(
    model: Any,
    taskset: TaskSet,
    processor: Any,
    split: str = "test",
    batch_size: int = 64,
    device: torch.device | str | None = None,
    resume_file: Path | str | None = None,
    *,
    tasks: Sequence[str] | None = None,
    metrics: Mapping[str, Sequence[str]] | None = None,
    limit: int | None = None,
    texts: bool = True,
    template: int = 0,
) -> dict[str, TaskScore]:
    """Score `model` on a split; a `TaskScore` per task, in the order of the task set.

    device: where batches go; None: where the model's first parameter is.
    resume_file: one JSON line a batch; a run that was killed goes on after the last whole line.
    tasks: only these. metrics: other metrics than the task's own, by task name.
    limit: at most this many rows per row group, the first ones.
    texts: have generation tasks write their answers; otherwise measures of text are skipped
    (`TaskScore.skipped`), exact match and perplexity are still exact, and it is much faster.
    template: which template of a row group to use.

    Raises `TaskError` for unknown tasks or a task without the split, `NonFiniteError` naming the
    row whose prediction is NaN, `UserError` when `resume_file` belongs to another evaluation.
    """
    chosen = _chosen(taskset, tasks, split)
    measures = {task.name: _metrics(task, metrics, texts) for _, task in chosen.values()}
    path = None if resume_file is None else Path(resume_file)

    def identity() -> dict[str, Any]:
        return {
            "model": fingerprint(model),
            "split": split,
            "tasks": {name: list(found) for name, (found, _) in measures.items()},
            "batch_size": batch_size,
            "limit": limit,
            "template": template,
        }

    kept = PartsFile(path, identity)
    try:
        for group_id, group in enumerate(taskset.groups):
            inside = {i: task for i, (g, task) in chosen.items() if g == group_id}
            if inside:
                _run_group(
                    model,
                    processor,
                    taskset,
                    group_id,
                    group,
                    inside,
                    {t.name: measures[t.name][0] for t in inside.values()},
                    kept,
                    _Settings(split, batch_size, device, limit, texts, template),
                )
    finally:
        kept.close()
    return {
        task.name: _score(taskset.groups[g], task, *measures[task.name], kept)
        for g, task in chosen.values()
    }


class _Settings:
    def __init__(
        self,
        split: str,
        batch_size: int,
        device: Any,
        limit: int | None,
        texts: bool,
        template: int,
    ) -> None:
        self.split, self.batch_size, self.device = split, batch_size, device
        self.limit, self.texts, self.template = limit, texts, template


def _chosen(
    taskset: TaskSet, wanted: Sequence[str] | None, split: str
) -> dict[int, tuple[int, Task]]:
    """Task id -> (group id, task)."""
    for name in wanted or ():
        if name not in taskset.names:
            raise TaskError(f"there is no task '{name}'.{suggestion(name, taskset.names)}")
    found: dict[int, tuple[int, Task]] = {}
    number = itertools.count()
    for group_id, group in enumerate(taskset.groups):
        for task in group.tasks:
            task_id = next(number)
            if wanted is not None and task.name not in wanted:
                continue
            if split not in task.splits:
                raise TaskError(
                    f"task '{task.name}' has no split '{split}' (has: {', '.join(task.splits)})"
                )
            found[task_id] = (group_id, task)
    return found


def _metrics(
    task: Task, other: Mapping[str, Sequence[str]] | None, texts: bool
) -> tuple[dict[str, Metric], tuple[str, ...]]:
    """The task's metrics by name, and those skipped because nothing is written."""
    names = tuple((other or {}).get(task.name) or task.metrics or task.schema.metrics)
    skipped = tuple(n for n in names if n in TEXT_METRICS and not texts)
    kept = [n for n in names if n not in skipped]
    return {name: find_metric(name, task.schema.head) for name in kept}, skipped


def _run_group(
    model: Any,
    processor: Any,
    taskset: TaskSet,
    group_id: int,
    group: RowGroup,
    tasks: Mapping[int, Task],
    metrics: Mapping[str, Mapping[str, Metric]],
    kept: PartsFile,
    settings: _Settings,
) -> None:
    """Add the parts of every batch of a group that `kept` does not have yet."""
    from polytask.models.collate import Collator

    collate = Collator.of(taskset, int(getattr(processor, "pad_id", 0) or 0))
    source = group.splits[settings.split]
    device = settings.device
    if device is None:
        device = next(iter(model.parameters())).device
    wants_text = settings.texts and any(
        set(found) & {*TEXT_METRICS, "exact_match"} for found in metrics.values()
    )
    decode = processor.decode if wants_text else None
    for start, rows in _chunks(source, settings.batch_size * CHUNK_BATCHES, settings.limit):
        keys = [f"{group.name}/{start + i}" for i in range(0, len(rows), settings.batch_size)]
        if all(key in kept.done for key in keys):
            continue
        indices = list(range(start, start + len(rows)))
        examples = processor.encode(
            group_id,
            rows,
            lambda i, start=start: source.where(start + i),
            indices=indices,
            template=settings.template,
        )
        examples.sort(key=_length)
        for number, key in enumerate(keys):
            if key in kept.done:
                continue
            first = number * settings.batch_size
            some = examples[first : first + settings.batch_size]
            batch = collate(some, [group_id] * len(some)).to(device)
            found = cases_of(model, batch, tasks, source.where, decode)
            parts = {
                name: part_of(cases, metrics[name], _context(tasks, name))
                for name, cases in found.items()
            }
            kept.add(key, parts)


def _length(example: Any) -> int:
    """Text tokens of a row, over its sequences; rows without text keep their order."""
    return sum(len(s["text.ids"]) for s in example.sequences if "text.ids" in s)


def _context(tasks: Mapping[int, Task], name: str) -> dict[str, Any]:
    schema = next(task.schema for task in tasks.values() if task.name == name)
    classes = getattr(schema, "classes", None)
    return {"classes": len(classes)} if classes else {}


def _chunks(source: Any, size: int, limit: int | None) -> Iterator[tuple[int, Sequence[Row]]]:
    """(first row number, rows) from a map-style source or a stream."""
    if isinstance(source, RowSource):
        total = len(source) if limit is None else min(limit, len(source))
        for start in range(0, total, size):
            yield start, source.take(range(start, min(start + size, total)))
        return
    stream = itertools.islice(source.read_from(0), limit)
    for start in itertools.count(0, size):
        rows = list(itertools.islice(stream, size))
        if not rows:
            return
        yield start, rows


def _score(
    group: RowGroup,
    task: Task,
    metrics: Mapping[str, Metric],
    skipped: tuple[str, ...],
    kept: PartsFile,
) -> TaskScore:
    """Join a task's parts and finish its metrics."""
    parts = [
        tasks[task.name]
        for key, tasks in kept.done.items()
        if key.rpartition("/")[0] == group.name and task.name in tasks
    ]
    whole = joined(parts) if parts else Part(np.zeros(0, np.int64))
    if task.schema.head == "match" and whole.raw:
        whole = match_part(whole, metrics)
    values: dict[str, float] = {}
    statistics = dict(whole.sums)
    for name, metric in metrics.items():
        if metric.statistics is not None and name not in statistics and whole.raw:
            statistics[name] = metric.statistics(whole.raw["prediction"], whole.raw["target"])
        if name in statistics:
            values[name] = metric.of_sums(statistics[name])
        elif whole.raw:
            values[name] = metric(whole.raw["prediction"], whole.raw["target"])
        else:
            values[name] = float("nan")
    primary = primary_of(task.schema, list(metrics))
    alone = np.full(len(whole.rows), np.nan)
    if primary in statistics:
        alone = metrics[primary].scores_of(statistics[primary])
    return TaskScore(
        task.name,
        task.schema.head,
        values,
        primary,
        alone,
        whole.rows,
        group.name,
        statistics,
        whole.raw,
        skipped,
    )
