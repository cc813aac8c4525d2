"""From a batch and a model to (prediction, target) per task, in the shapes that metrics take.

A batch may mix tasks, padded to the widest; here each task gets its own columns back. Predictions
that are not finite stop the evaluation with the row's place.

A language model is scored by the likelihood of its labelled tokens. Whether greedy decoding would
write exactly the target is known without writing: it does if and only if every labelled token is
the most likely one given the target so far.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from polytask.errors import NonFiniteError
from polytask.evaluate.numbers import naive_scale
from polytask.tasks.task import Task

if TYPE_CHECKING:
    from polytask.models.batch import Batch

Array = npt.NDArray[Any]
Where = Callable[[int], str]
Decode = Callable[[Any], str]
TEXT_METRICS = ("token_f1", "rouge_l", "chrf")


@dataclass(frozen=True)
class Cases:
    """Labelled rows of one task: row numbers, predictions, targets, further arrays by name.

    extra: 'scale' (n, channels) for forecasts; 'written' (n,) for texts: 1 where greedy decoding
    gives the target. Texts have the likelihood (n, 2) as prediction, and strings in `guess` and
    `truth` if they were written. whole: can only be judged with all rows (matching).
    """

    rows: Array
    prediction: Array
    target: Array
    extra: dict[str, Array]
    guess: list[str] | None = None
    truth: list[str] | None = None
    whole: bool = False


def cases_of(
    model: Any, batch: Batch, tasks: Mapping[int, Task], where: Where, decode: Decode | None = None
) -> dict[str, Cases]:
    """Task name -> cases of the batch, for the task ids in `tasks`; pairs without label left out.

    `decode` (token ids -> text) also has the texts of generation tasks written, greedily.
    """
    found: dict[str, Cases] = {}
    for kind, target in batch.targets.items():
        if kind == "generate":
            found |= _texts(model, replace(batch, targets={kind: target}), tasks, where, decode)
            continue
        said = model.predict(replace(batch, targets={kind: target}))[kind]
        value = target.value.cpu().numpy()
        sequence = target.sequence.cpu().numpy()
        for task_id in sorted({int(t) for t in said[0]} & set(tasks)):
            at = np.flatnonzero(said[0] == task_id)
            task = tasks[task_id]
            guess, truth = _own(kind, task.schema, said[2][at], value[at])
            _check_finite(task.name, guess, said[1][at], where)
            extra = {}
            if kind == "forecast":
                extra["scale"] = _scale(batch, sequence[at, 0], task, truth.shape[2])
            whole = kind == "match"
            found[task.name] = Cases(said[1][at], guess, truth, extra, whole=whole)
    return found


def _own(kind: str, schema: Any, guess: Array, truth: Array) -> tuple[Array, Array]:
    """Only the task's own columns of arrays that were padded to the batch's widest task."""
    if kind == "classify":
        return guess[:, : len(schema.classes)], truth
    if kind == "multilabel":
        width = len(schema.classes)
        return guess[:, :width], truth[:, :width]
    if kind == "regress":
        return guess[:, : schema.outputs], truth[:, : schema.outputs]
    if kind == "forecast":
        h, c = schema.horizon, schema.channels
        return guess[:, :h, :c], truth[:, :h, :c]
    if kind == "dense":
        h, w = schema.height, schema.width
        return guess[:, :h, :w], truth[:, :h, :w]
    if kind == "tag":
        # Batches differ in width; a fixed one (unknown beyond) lets them be stacked.
        width = max(guess.shape[1], truth.shape[1])
        return _widened(guess, width), _widened(truth, width)
    return guess, truth


def _widened(array: Array, width: int) -> Array:
    return np.pad(array, ((0, 0), (0, width - array.shape[1])), constant_values=-100)


def _check_finite(task: str, guess: Array, rows: Array, where: Where) -> None:
    if guess.dtype.kind == "f" and not np.isfinite(guess).all():
        bad = int(rows[int(np.argwhere(~np.isfinite(guess))[0][0])])
        raise NonFiniteError(f"task '{task}': the prediction for {where(bad)} is not finite")


def _scale(batch: Batch, sequence: Array, task: Task, channels: int) -> Array:
    """(n, channels) MASE's divisor from the part of each series that the model sees."""
    holder = {int(s): i for i, s in enumerate(batch.fields["series.sequence"].cpu().numpy())}
    entry = [holder[int(s)] for s in sequence]
    history = batch.fields["series.values"].cpu().numpy()[entry, :, :channels]
    return naive_scale(history, int(task.options.get("season", 1)))


def _texts(
    model: Any, batch: Batch, tasks: Mapping[int, Task], where: Where, decode: Decode | None
) -> dict[str, Cases]:
    target = batch.targets["generate"]
    table = _likelihoods(model, batch)
    task_of, row_of = target.task.cpu().numpy(), target.row.cpu().numpy()
    label = target.value.cpu().numpy()
    found = {}
    for task_id in sorted({int(t) for t in task_of} & set(tasks)):
        at = np.flatnonzero(task_of == task_id)
        task = tasks[task_id]
        _check_finite(task.name, table[at], row_of[at], where)
        guess = truth = None
        if decode is not None and task.schema.kind == "generation":
            import torch

            some = target.select(torch.from_numpy(at).to(target.value.device))
            ids = model.predict(replace(batch, targets={"generate": some}))["generate"][2]
            guess = [decode(row) for row in ids]
            truth = [decode(row[row >= 0]) for row in label[at]]
        written = (table[at, 2] == table[at, 1]).astype(np.float64)
        found[task.name] = Cases(
            row_of[at], table[at, :2], written, {"written": written}, guess, truth
        )
    return found


def _likelihoods(model: Any, batch: Batch) -> Array:
    """(pairs, 3): nats, labelled tokens, and how many of them the model finds most likely."""
    import torch

    from polytask.models.heads.base import on_device
    from polytask.objectives import projected_cross_entropy

    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            features = model.shared_features(batch)
            pairs = model.pairs(batch, "generate")
            head = model.heads["generate"]
            hidden, pair, position = head.selected(features, pairs)
            weight, bias = head.scorer(features)
            label = pairs.target.value[on_device(pair, hidden), on_device(position, hidden)]
            nats, _ = projected_cross_entropy(hidden, weight, label, bias)
            best = [
                torch.nn.functional.linear(h, weight, bias).argmax(-1) for h in hidden.split(512)
            ]
            hit = (torch.cat(best) == label).cpu().numpy()
            nll = nats.double().cpu().numpy()
    finally:
        model.train(training)
    sums = (
        np.bincount(pair, weights, minlength=len(pairs)).astype(np.float64)
        for weights in (nll, None, hit.astype(np.float64))
    )
    return np.stack(list(sums), axis=1)
