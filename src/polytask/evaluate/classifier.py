"""Scores of a Hugging Face sequence classifier on a task: its own tokenizer, its own labels.

Text goes in as the model was trained on it (`tokenizer(text)` or `tokenizer(a, b)`), and the task's
classes are found among the model's labels by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from polytask.data.rows import Row, RowSource
from polytask.errors import NonFiniteError, TaskError
from polytask.evaluate.metric import find_metric
from polytask.evaluate.scored import TaskScore, primary_of
from polytask.tasks.schemas import Classification, Regression, is_missing, label_key
from polytask.tasks.task import Task
from polytask.tasks.templates import Template, default_template


def check_classifier(model: Any, task: Task, split: str) -> None:
    """`TaskError` when the model cannot answer the task, or the task has no such rows."""
    _columns(model, task)
    _texts(task)
    if split not in task.splits:
        raise TaskError(
            f"task '{task.name}' has no split '{split}' (has: {', '.join(task.splits)})"
        )


@torch.inference_mode()
def score_classifier(
    model: Any,
    tokenizer: Any,
    task: Task,
    split: str = "test",
    batch_size: int = 64,
    limit: int | None = None,
) -> TaskScore:
    """Score on the labelled rows of a split.

    Args:
        model: `AutoModelForSequenceClassification`, in evaluation mode.
        tokenizer: its own.
        task: classification of a text or a pair, or regression with one output.
        limit: at most this many rows, the first ones.

    Raises:
        TaskError: a task of another kind, or classes that are not among the model's labels.
        NonFiniteError: NaN in a prediction; the row is named.
    """
    columns, fields = _columns(model, task), _texts(task)
    source = task.splits[split]
    total = limit if not isinstance(source, RowSource) else min(limit or len(source), len(source))
    rows: Sequence[Row]
    if isinstance(source, RowSource):
        rows = source.take(range(total or 0))
    else:
        rows = [row for _, row in zip(range(total or 10_000), source.read_from(0))]
    kept = [i for i, row in enumerate(rows) if not is_missing(task.raw_label(row))]
    target = np.array([task.schema.read(task.raw_label(rows[i])) for i in kept]).reshape(-1)
    device = next(iter(model.parameters())).device
    parts = []
    for start in range(0, len(kept), batch_size):
        some = [rows[i] for i in kept[start : start + batch_size]]
        texts = [[t.fill(t.contents(row)) for row in some] for t in fields]
        batch = tokenizer(*texts, padding=True, truncation=True, return_tensors="pt").to(device)
        logits = model(**batch).logits.float().cpu()
        if not bool(torch.isfinite(logits).all()):
            row = int((~torch.isfinite(logits)).any(1).nonzero()[0])
            raise NonFiniteError(
                f"task '{task.name}': the prediction for {source.where(kept[start + row])} is not "
                "finite"
            )
        parts.append(logits[:, columns].numpy())
    said = np.concatenate(parts) if parts else np.zeros((0, len(columns)), np.float32)
    return _score(task, said, target, np.array(kept, dtype=np.int64))


def _score(task: Task, said: Any, target: Any, rows: Any) -> TaskScore:
    names = task.metrics or task.schema.metrics
    prediction = said if isinstance(task.schema, Classification) else said[:, 0]
    context = {"classes": said.shape[1]} if isinstance(task.schema, Classification) else {}
    values, statistics = {}, {}
    for name in names:
        metric = find_metric(name, task.schema.head)
        more = {k: v for k, v in context.items() if k in metric.needs}
        values[name] = metric(prediction, target, **more)
        if metric.statistics is not None:
            statistics[name] = metric.statistics(prediction, target, **more)
    primary = primary_of(task.schema, list(names))
    alone = np.full(len(rows), np.nan)
    if primary in statistics:
        alone = find_metric(primary, task.schema.head).scores_of(statistics[primary])
    raw = {"prediction": prediction, "target": target}
    return TaskScore(
        task.name, task.schema.head, values, primary, alone, rows, task.name, statistics, raw
    )


def _columns(model: Any, task: Task) -> list[int]:
    """For each class of the task, the model's output for it."""
    outputs = int(model.config.num_labels)
    if isinstance(task.schema, Regression):
        if task.schema.outputs != 1 or outputs != 1:
            raise TaskError(
                f"task '{task.name}': a regression here has one output, {outputs} found"
            )
        return [0]
    if not isinstance(task.schema, Classification):
        raise TaskError(
            f"task '{task.name}' is of kind '{task.schema.kind}'; a sequence classifier answers "
            "classification, pairs and regression"
        )
    classes = task.schema.classes
    named = {label_key(name): int(i) for i, name in model.config.id2label.items()}
    if all(name in named for name in classes):
        return [named[name] for name in classes]
    generic = all(str(name).startswith("LABEL_") for name in named)
    if generic and len(classes) == outputs:
        return list(range(outputs))
    lost = next((name for name in classes if name not in named), classes[0])
    raise TaskError(
        f"task '{task.name}': class '{lost}' is not among the model's labels "
        f"({', '.join(list(named)[:8])}); give 'classes' in the order of its outputs, or a "
        "'verbaliser' that maps raw labels to them"
    )


def _texts(task: Task) -> list[Template]:
    other = [field.modality for field in task.inputs if field.modality != "text"]
    if other or not 1 <= len(task.inputs) <= 2:
        raise TaskError(
            f"task '{task.name}': a sequence classifier reads one text or two, not "
            f"{', '.join(other) or len(task.inputs)}"
        )
    ordered = sorted(task.inputs, key=lambda field: field.slot)  # a before b
    return [Template.parse(f.template or default_template(f.columns)) for f in ordered]
