"""Look at it: the page of a run, the page of a proof, their pictures."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polytask.report.forecast_page import forecast_report
    from polytask.report.layout import (
        LedgerRow,
        MixtureRow,
        Range,
        RunScores,
        TaskRow,
        read_run,
        run_scores,
        scores_of,
    )
    from polytask.report.proof_page import proof_report
    from polytask.report.run_page import run_report
    from polytask.report.words import ScoreRow, score_rows

_HOME = {
    "forecast_report": "forecast_page",
    "LedgerRow": "layout",
    "MixtureRow": "layout",
    "Range": "layout",
    "RunScores": "layout",
    "ScoreRow": "words",
    "TaskRow": "layout",
    "proof_report": "proof_page",
    "read_run": "layout",
    "run_report": "run_page",
    "run_scores": "layout",
    "score_rows": "words",
    "scores_of": "layout",
}

__all__ = [  # noqa: RUF022 - in reading order
    "run_report",
    "proof_report",
    "forecast_report",
    "RunScores",
    "TaskRow",
    "Range",
    "LedgerRow",
    "MixtureRow",
    "run_scores",
    "scores_of",
    "read_run",
    "ScoreRow",
    "score_rows",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'polytask.report' has no attribute '{name}'")
    return getattr(importlib.import_module(f"polytask.report.{_HOME[name]}"), name)
