"""Compare honestly: arms, claims, measured budgets, paired seeds, intervals, evidence."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polytask.study.budget import BudgetCheck, BudgetError
    from polytask.study.collect import Executor, Progress
    from polytask.study.evidence import (
        ArmRecord,
        Evidence,
        Judgement,
        Trial,
        Verdict,
        evidence_of,
        load_evidence,
    )
    from polytask.study.execute import ArmError
    from polytask.study.records import Arm, Budget, Claim, Provable, Result, Size, Study, study_of
    from polytask.study.runner import prove
    from polytask.study.tuning import Tuning, tune
    from polytask.study.versions import environment

_HOME = {
    "Arm": "records",
    "ArmError": "execute",
    "ArmRecord": "evidence",
    "Budget": "records",
    "BudgetCheck": "budget",
    "BudgetError": "budget",
    "Claim": "records",
    "Evidence": "evidence",
    "Executor": "collect",
    "Judgement": "evidence",
    "Progress": "collect",
    "Provable": "records",
    "Result": "records",
    "Size": "records",
    "Study": "records",
    "Trial": "evidence",
    "Tuning": "tuning",
    "Verdict": "evidence",
    "environment": "versions",
    "evidence_of": "evidence",
    "prove": "runner",
    "load_evidence": "evidence",
    "study_of": "records",
    "tune": "tuning",
}

__all__ = [  # noqa: RUF022 - in reading order
    "Arm",
    "Claim",
    "Budget",
    "Result",
    "Study",
    "Provable",
    "Size",
    "study_of",
    "prove",
    "Executor",
    "Progress",
    "Evidence",
    "ArmRecord",
    "Trial",
    "Judgement",
    "Verdict",
    "load_evidence",
    "evidence_of",
    "BudgetCheck",
    "BudgetError",
    "ArmError",
    "Tuning",
    "tune",
    "environment",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'polytask.study' has no attribute '{name}'")
    return getattr(importlib.import_module(f"polytask.study.{_HOME[name]}"), name)
