"""Numbers as people read them, and the rows of the headline table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from polytask.report.layout import Range, RunScores, TaskRow, scores_of

MINUS = "\u2212"
SPACE = "\u202f"  # narrow, does not break


def number(value: float | None, digits: int = 3) -> str:
    """`digits` decimals for shares and small numbers, fewer for large ones; a value that would
    round to 0 keeps one figure; an en dash for None."""
    if value is None or not math.isfinite(value):
        return "–"
    size = abs(value)
    if size >= 1e6 or 0 < size < 5e-6:
        text = f"{value:.2e}"
    elif size >= 1000:
        text = f"{value:,.0f}"
    elif 0 < size < 0.5 * 10**-digits:
        text = f"{value:.{math.ceil(-math.log10(size))}f}"
    else:
        decimals = digits if size < 10 else digits - 1 if size < 100 else digits - 2
        text = f"{value:.{decimals}f}"
    return text.replace("-", MINUS)


def signed(value: float | None, digits: int = 3) -> str:
    """`number` with its sign; 0 has none."""
    text = number(value, digits)
    return f"+{text}" if value is not None and value > 0 and text != "–" else text


def percent(value: float | None) -> str:
    """A signed share in per cent, one decimal."""
    if value is None or not math.isfinite(value):
        return "–"
    rounded = round(100 * value, 1) + 0.0  # no negative zero
    text = f"{rounded:+.1f}" if rounded else "0.0"
    return f"{text.replace('-', MINUS)}{SPACE}%"


def amount(value: float | None) -> str:
    """A count or an amount, short: 950, 12.3 k, 4.56 M, 7.8 G."""
    if value is None or not math.isfinite(value):
        return "–"
    for size, name in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            scale = 1e3 if name == "k" else size
            return f"{value / scale:.3g}{SPACE}{name}"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def duration(seconds: float | None) -> str:
    """Seconds as '41 s', '3 min 20 s', '2 h 05 min'."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    whole = round(seconds)
    if whole < 100:
        return f"{seconds:.1f}{SPACE}s" if seconds < 10 else f"{whole}{SPACE}s"
    if whole < 3600:
        return f"{whole // 60}{SPACE}min {whole % 60:02d}{SPACE}s"
    return f"{whole // 3600}{SPACE}h {whole % 3600 // 60:02d}{SPACE}min"


def interval(found: Range | None, show: Any = signed) -> str:
    """'−0.01 to +0.03'."""
    if found is None or not found.known:
        return "–"
    return f"{show(found.low)} to {show(found.high)}"


Verdict = Literal["better", "worse", "same", ""]


def verdict(found: Range | None) -> Verdict:
    """Whether the interval of a gain lies above 0, below, or holds it; '' without an interval."""
    if found is None or found.low is None or found.high is None:
        return ""
    return "better" if found.low > 0 else "worse" if found.high < 0 else "same"


@dataclass(frozen=True)
class ScoreRow:
    """A row of the headline table, as text. `difference` is the gain: + means multitask better,
    whatever the metric's direction; `verdict` says whether its interval excludes 0."""

    task: str
    metric: str
    multitask: str
    single: str
    difference: str
    interval: str
    verdict: Verdict
    rows: int


def score_rows(scores: RunScores | Mapping[str, Any]) -> list[ScoreRow]:
    """The headline table of a run, from `RunScores` or what scores.json holds."""
    found = scores if isinstance(scores, RunScores) else scores_of(scores)
    return [_row(task) for task in found.tasks]


def _row(task: TaskRow) -> ScoreRow:
    return ScoreRow(
        task=task.task,
        metric=metric_name(task.metric, task.higher_is_better),
        multitask=number(task.multitask),
        single=number(task.single),
        difference=signed(task.gain.mean if task.gain else None),
        interval=interval(task.gain),
        verdict=verdict(task.gain),
        rows=task.n,
    )


def metric_name(metric: str, higher_is_better: bool) -> str:
    """The metric with the direction that is better."""
    return f"{plain_metric(metric)} {'↑' if higher_is_better else '↓'}"


def plain_metric(metric: str) -> str:
    """A metric's name for people."""
    known = {
        "macro_f1": "macro F1",
        "micro_f1": "micro F1",
        "token_f1": "token F1",
        "auroc": "AUROC",
        "rmse": "RMSE",
        "mae": "MAE",
        "r2": "R²",
        "mrr": "MRR",
        "smape": "sMAPE",
        "mase": "MASE",
        "miou": "mIoU",
        "ece": "ECE",
        "chrf": "chrF",
        "rouge_l": "ROUGE-L",
    }
    return known.get(metric, metric.replace("_", " "))
