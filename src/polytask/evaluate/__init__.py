"""Judge it: metrics, per-task tables, multitask against single-task, transfer, forgetting."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polytask.evaluate.intervals import Interval, bootstrap_interval, holm, t_interval, t_test
    from polytask.evaluate.metric import METRICS, Metric, find_metric, metric_names
    from polytask.evaluate.run import evaluate
    from polytask.evaluate.scored import TaskScore, table

_HOME = {
    "METRICS": "metric",
    "Interval": "intervals",
    "Metric": "metric",
    "TaskScore": "scored",
    "bootstrap_interval": "intervals",
    "evaluate": "run",
    "find_metric": "metric",
    "holm": "intervals",
    "metric_names": "metric",
    "t_interval": "intervals",
    "t_test": "intervals",
    "table": "scored",
}

__all__ = [  # noqa: RUF022 - in reading order
    "evaluate",
    "TaskScore",
    "table",
    "METRICS",
    "Metric",
    "find_metric",
    "metric_names",
    "Interval",
    "t_interval",
    "t_test",
    "bootstrap_interval",
    "holm",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'polytask.evaluate' has no attribute '{name}'")
    return getattr(importlib.import_module(f"polytask.evaluate.{_HOME[name]}"), name)
