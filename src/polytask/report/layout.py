"""What a run folder holds for its readers: the records behind scores.json and config.json.

    config.json     {"config": resolved configuration, "environment": study.environment()}
    metrics.jsonl   lines of `polytask.train.trackers`
    scores.json     `RunScores` below

`run_scores` builds the record from what evaluation, comparison and ledger give; `to_dict` is what
is written. Numbers that are undefined are null.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as record

from polytask.errors import DataError

if TYPE_CHECKING:
    from polytask.evaluate import Comparison, Interval, TaskScore, TransferMatrix

STRICT = ConfigDict(extra="forbid")


@record(frozen=True, config=STRICT)
class Range:
    """An estimate with its interval."""

    mean: float | None
    low: float | None
    high: float | None

    @property
    def known(self) -> bool:
        return None not in (self.mean, self.low, self.high)


@record(frozen=True, config=STRICT)
class TaskRow:
    """One task: its primary metric, both models, and the gain (positive: multitask is better)."""

    task: str
    metric: str
    higher_is_better: bool
    n: int
    multitask: float | None
    single: float | None = None
    gain: Range | None = None  # in units of the metric
    relative: Range | None = None  # as a share of the single-task value
    metrics: dict[str, float | None] = field(default_factory=dict)  # all of the multitask model's
    unit: str = ""


@record(frozen=True, config=STRICT)
class LedgerRow:
    """What a task was given; epochs None for a stream."""

    task: str
    examples: int
    tokens: int
    flops: float
    seconds: float
    epochs: float | None = None


@record(frozen=True, config=STRICT)
class MixtureRow:
    """Share of rows that the policy asked for and that the group got (groups share rows)."""

    group: str
    policy: float
    realised: float
    rows: int


@record(frozen=True, config=STRICT)
class Transfer:
    """`TransferMatrix.to_dict()`: gain[i][j] is what task i does for task j, as a share."""

    tasks: list[str]
    mode: Literal["pairs", "direct"]
    gain: list[list[float | None]]
    alone: list[float | None] = field(default_factory=list)
    score: list[list[float | None]] = field(default_factory=list)


@record(frozen=True, config=STRICT)
class RunScores:
    """What scores.json holds."""

    tasks: list[TaskRow]
    split: str = "test"
    confidence: float = 0.95
    over: Literal["rows", "seeds"] = "rows"
    delta_m: Range | None = None
    left_out: list[str] = field(default_factory=list)
    spent: dict[str, tuple[float, float]] = field(default_factory=dict)  # multitask, single-task
    ledger: list[LedgerRow] = field(default_factory=list)
    mixture: list[MixtureRow] = field(default_factory=list)
    policy: str = ""
    transfer: Transfer | None = None
    parameters: int | None = None
    seconds: float | None = None
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        value: dict[str, Any] = _SCORES.dump_python(self, mode="json")
        return value


_SCORES: TypeAdapter[RunScores] = TypeAdapter(RunScores)


def scores_of(data: Any, where: str = "scores") -> RunScores:
    """`RunScores` from plain JSON values; `DataError` says what does not fit."""
    try:
        return _SCORES.validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{where} does not fit: '{key}': {first['msg']}") from error


def run_scores(
    scores: Mapping[str, TaskScore],
    comparison: Comparison | None = None,
    *,
    ledger: Sequence[Mapping[str, Any]] = (),
    mixture: Sequence[MixtureRow] = (),
    policy: str = "",
    transfer: TransferMatrix | None = None,
    split: str = "test",
    parameters: int | None = None,
    seconds: float | None = None,
    notes: Sequence[str] = (),
) -> RunScores:
    """The record of a run. `ledger`: `Ledger.rows()` (its total is left out)."""
    gains = {gain.task: gain for gain in comparison.tasks} if comparison else {}
    tasks = []
    for name, score in scores.items():
        gain = gains.get(name)
        tasks.append(
            TaskRow(
                task=name,
                metric=score.primary,
                higher_is_better=score.higher_is_better,
                n=score.n,
                multitask=_plain(score.value),
                single=_plain(gain.single) if gain else None,
                gain=_range(gain.gain) if gain else None,
                relative=_range(gain.relative) if gain else None,
                metrics={key: _plain(value) for key, value in score.metrics.items()},
                unit=score.metric(score.primary).unit,
            )
        )
    return RunScores(
        tasks=tasks,
        split=split,
        confidence=comparison.delta_m.confidence if comparison else 0.95,
        over="seeds" if comparison and comparison.over == "seeds" else "rows",
        delta_m=_range(comparison.delta_m) if comparison else None,
        left_out=list(comparison.left_out) if comparison else [],
        spent=dict(comparison.spent) if comparison else {},
        ledger=[LedgerRow(**row) for row in ledger if row["task"] != "total"],
        mixture=list(mixture),
        policy=policy,
        transfer=Transfer(**transfer.to_dict()) if transfer else None,
        parameters=parameters,
        seconds=seconds,
        notes=list(notes),
    )


def _plain(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _range(interval: Interval) -> Range:
    return Range(_plain(interval.mean), _plain(interval.low), _plain(interval.high))


@record(frozen=True, config=STRICT)
class RunData:
    """Everything the report of a run reads."""

    name: str
    config: dict[str, Any]
    environment: dict[str, Any]
    lines: list[dict[str, Any]]
    scores: RunScores | None


def read_run(folder: Path) -> RunData:
    """Read a run folder. Scores may be missing (the run goes on); config.json may not."""
    path = folder / "config.json"
    if not path.is_file():
        raise DataError(f"{folder} is not a run folder: it has no config.json")
    content = _json(path)
    config = content.get("config", content) if isinstance(content, dict) else {}
    environment = content.get("environment", {}) if isinstance(content, dict) else {}
    scores = folder / "scores.json"
    return RunData(
        name=str(config.get("name") or folder.resolve().name),
        config=config,
        environment=environment,
        lines=_lines(folder / "metrics.jsonl"),
        scores=scores_of(_json(scores), str(scores)) if scores.is_file() else None,
    )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error


def _lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a metrics file; the torn last one of a killed run is left out."""
    if not path.is_file():
        return []
    found = []
    for number, raw in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            found.append(json.loads(raw))
        except ValueError as error:
            raise DataError(f"{path}, line {number} is not JSON: {error}") from error
    return found
