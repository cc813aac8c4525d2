"""Judge it: metrics, per-task tables, multitask against single-task, transfer, forgetting."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polytask.evaluate.calibration import (
        Reliability,
        SetScore,
        agreement,
        compare_on_sets,
        reliability,
    )
    from polytask.evaluate.comparison import (
        Comparison,
        TaskGain,
        compare_seeds,
        compare_single,
        delta_m,
    )
    from polytask.evaluate.forgetting import Gap, ScoreMatrix, stability_gap
    from polytask.evaluate.intervals import Interval, bootstrap_interval, holm, t_interval, t_test
    from polytask.evaluate.metric import METRICS, Metric, find_metric, metric_names
    from polytask.evaluate.run import evaluate
    from polytask.evaluate.scored import TaskScore, table
    from polytask.evaluate.transfer import TransferMatrix, transfer_matrix

_HOME = {
    "Reliability": "calibration",
    "SetScore": "calibration",
    "agreement": "calibration",
    "compare_on_sets": "calibration",
    "reliability": "calibration",
    "Comparison": "comparison",
    "Gap": "forgetting",
    "ScoreMatrix": "forgetting",
    "TaskGain": "comparison",
    "TransferMatrix": "transfer",
    "compare_single": "comparison",
    "compare_seeds": "comparison",
    "delta_m": "comparison",
    "stability_gap": "forgetting",
    "transfer_matrix": "transfer",
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
    "compare_single",
    "compare_seeds",
    "Comparison",
    "TaskGain",
    "delta_m",
    "transfer_matrix",
    "TransferMatrix",
    "ScoreMatrix",
    "Gap",
    "stability_gap",
    "reliability",
    "Reliability",
    "agreement",
    "compare_on_sets",
    "SetScore",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'polytask.evaluate' has no attribute '{name}'")
    return getattr(importlib.import_module(f"polytask.evaluate.{_HOME[name]}"), name)
