"""Who helps whom: the task x task transfer matrix.

    pairs    entry (i, j): the relative gain on task j of training on {i, j} over training on {j}
    direct   entry (i, j): the relative gain on task j of training on {i} alone over training on {j}

Positive is better whatever the metric's direction. The diagonal is 0 by definition. `train` gets
the tasks to train on and gives the score of every task to be judged; equal budgets are its
business. (Standley et al. 2020, arXiv 1905.07553, for pairs trained together.)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from polytask import files
from polytask.errors import UserError
from polytask.evaluate.metric import Floats

Mode = Literal["pairs", "direct"]
Train = Callable[[tuple[str, ...]], Mapping[str, float]]


@dataclass(frozen=True)
class TransferMatrix:
    """gain[i, j] (tasks, tasks): what i does for j, as a share of j's own score."""

    tasks: tuple[str, ...]
    gain: Floats
    alone: Floats  # (tasks,) score of each task trained by itself
    score: Floats  # (tasks, tasks) score on j of the model with i
    mode: Mode

    @property
    def given(self) -> Floats:
        """(tasks,) mean gain that each task gives the others."""
        return self._mean(axis=1)

    @property
    def received(self) -> Floats:
        """(tasks,) mean gain that each task gets from the others."""
        return self._mean(axis=0)

    def _mean(self, axis: int) -> Floats:
        others = self.gain.copy()
        np.fill_diagonal(others, np.nan)
        means: Floats = np.nanmean(others, axis=axis)
        return means

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; NaN as None."""

        def plain(values: Floats) -> Any:
            if values.ndim > 1:
                return [plain(row) for row in values]
            return [float(v) if np.isfinite(v) else None for v in values]

        return {
            "tasks": list(self.tasks),
            "mode": self.mode,
            "gain": plain(self.gain),
            "alone": plain(self.alone),
            "score": plain(self.score),
        }


def transfer_matrix(
    tasks: Sequence[str],
    train: Train,
    higher_is_better: Mapping[str, bool],
    mode: Mode = "pairs",
    cache: Path | None = None,
) -> TransferMatrix:
    """Train on every task and (mode 'pairs') every pair of tasks, and tabulate.

    cache: a JSON file with the scores so far; an interrupted call goes on from it.
    """
    names = tuple(tasks)
    if len(set(names)) != len(names) or len(names) < 2:
        raise UserError("a transfer matrix needs at least two tasks of different names")
    known = _read(cache)

    def scores(subset: tuple[str, ...]) -> Mapping[str, float]:
        key = "+".join(sorted(subset))
        if key not in known:
            known[key] = {name: float(value) for name, value in train(subset).items()}
            if cache is not None:
                files.write_json(cache, known)
        return known[key]

    count = len(names)
    alone = np.array([scores((name,))[name] for name in names])
    score = np.full((count, count), np.nan)
    for i in range(count):
        for j in range(count):
            if i == j:
                score[i, j] = alone[j]
            elif mode == "direct":
                score[i, j] = scores((names[i],))[names[j]]
            else:
                pair = tuple(name for name in names if name in (names[i], names[j]))
                score[i, j] = scores(pair)[names[j]]
    sign = np.array([1.0 if higher_is_better[name] else -1.0 for name in names])
    gain = np.full((count, count), np.nan)
    np.divide(sign * (score - alone), np.abs(alone), out=gain, where=alone != 0)
    return TransferMatrix(names, gain, alone, score, mode)


def _read(cache: Path | None) -> dict[str, dict[str, float]]:
    if cache is None or not cache.is_file():
        return {}
    try:
        found: dict[str, dict[str, float]] = json.loads(cache.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{cache} cannot be read ({error}): delete it to start over") from error
    return found
