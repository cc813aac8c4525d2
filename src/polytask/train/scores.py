"""When to stop early: a metric that has stopped improving."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from polytask.errors import ConfigError, suggestion
from polytask.train.config import EarlyStopping

Scores = Mapping[str, Mapping[str, float]]  # task -> metric -> value


class Stopper:
    """Follows one number over evaluations; does nothing without a configuration."""

    def __init__(self, config: EarlyStopping | None, tasks: Sequence[str]) -> None:
        if config is not None and config.task is not None and config.task not in tasks:
            raise ConfigError(
                f"early_stopping: unknown task '{config.task}'.{suggestion(config.task, tasks)}"
            )
        self.config = config
        self.best: float | None = None
        self.best_step: int | None = None
        self.waited = 0

    @property
    def stopped(self) -> bool:
        return self.config is not None and self.waited >= self.config.patience

    def improved(self, step: int, scores: Scores) -> bool:
        """Take in an evaluation; whether it is the best so far."""
        if self.config is None:
            return False
        value = self._value(self.config, scores)
        sign = 1 if self.config.higher_is_better else -1
        if self.best is None or sign * (value - self.best) > self.config.margin:
            self.best, self.best_step, self.waited = value, step, 0
            return True
        self.waited += 1
        return False

    def _value(self, config: EarlyStopping, scores: Scores) -> float:
        tasks = scores if config.task is None else {config.task: scores.get(config.task, {})}
        values = [m[config.metric] for m in tasks.values() if config.metric in m]
        if not values:
            known = sorted({name for metrics in tasks.values() for name in metrics})
            raise ConfigError(
                f"early_stopping: no task reports '{config.metric}'."
                f"{suggestion(config.metric, known)}"
            )
        return sum(values) / len(values)

    def state(self) -> dict[str, Any]:
        return {"best": self.best, "best_step": self.best_step, "waited": self.waited}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.best, self.best_step = state["best"], state["best_step"]
        self.waited = state["waited"]
