"""What a finished training is worth: test scores, one model per task beside it, and the page."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polytask import files
from polytask.evaluate import (
    TaskScore,
    TransferMatrix,
    compare_single,
    evaluate,
    transfer_matrix,
)
from polytask.pipeline.diagnosing import diagnose
from polytask.pipeline.expert_use import diagnose_experts
from polytask.pipeline.fit import fit
from polytask.pipeline.prepare import Prepared, Say, subset
from polytask.pipeline.run import MODEL, Run, save_model
from polytask.report.layout import MixtureRow, run_scores


def judge(prepared: Prepared, run: Run, tell: Say) -> None:
    """Save the model; test scores, single-task models, intervals; then the report."""
    from polytask.report import run_report
    from polytask.report.skills_page import skills_page

    settings = prepared.config.evaluate
    save_model(run.folder / MODEL, prepared.model, prepared.processor)
    tell("scoring the test rows")
    scores = _test(prepared)
    single: dict[str, TaskScore] = {}
    if settings.single_task and len(prepared.taskset.tasks) > 1:
        single = _single_tasks(prepared, run.folder, tell)
    comparison = (
        compare_single(
            {name: scores[name] for name in single},
            single,
            settings.confidence,
            settings.resamples,
            prepared.config.seed,
            spent={"rows": _rows_spent(run.folder)},
            tolerance=_rounding(prepared, run.folder),
        )
        if single
        else None
    )
    booked = _read_ledger(run.folder)
    record = run_scores(
        scores,
        comparison,
        ledger=booked["tasks"],
        mixture=[MixtureRow(**row) for row in booked["mixture"]],
        policy=prepared.config.mixture.policy,
        transfer=_transfer(prepared, run.folder, scores, tell),
        parameters=sum(p.numel() for p in prepared.model.parameters()),
        notes=_notes(prepared),
    )
    if prepared.leaks is not None:
        files.write_json(run.folder / "leaks.json", prepared.leaks.to_json())
    if prepared.config.adapt is not None:
        diagnose(prepared, run.folder)
    if prepared.config.model.experts is not None:
        diagnose_experts(prepared, run.folder)
    if prepared.config.mixture.policy in ("skillit", "curriculum"):
        skills_page(run.folder)
    files.write_json(run.folder / "scores.json", record.to_dict())
    run_report(run.folder)
    shutil.rmtree(run.folder / "single", ignore_errors=True)


def _test(prepared: Prepared) -> dict[str, TaskScore]:
    settings = prepared.config.evaluate
    return evaluate(
        prepared.model, prepared.taskset, prepared.processor, "test", settings.batch_size
    )


def _single_tasks(prepared: Prepared, folder: Path, tell: Say) -> dict[str, TaskScore]:
    """One model per task, each trained on as many rows as the task had in the mixture."""
    rows = _rows_drawn(prepared, folder)
    batch = prepared.config.train.batch_size
    found: dict[str, TaskScore] = {}
    for number, name in enumerate(prepared.taskset.names, 1):
        steps = max(1, round(rows[name] / batch))
        tell(
            f"one model for '{name}' alone, {steps} steps ({number}/{len(prepared.taskset.tasks)})"
        )
        alone = subset(prepared, [name])
        result = fit(alone, folder / "single" / name, steps)
        if result.stopped == "interrupted":
            raise KeyboardInterrupt
        found |= _test(alone)
    return found


def _transfer(
    prepared: Prepared, folder: Path, scores: Mapping[str, TaskScore], tell: Say
) -> TransferMatrix | None:
    """What each task does for each other one: every task and every pair, trained alike."""
    steps = prepared.config.evaluate.transfer_steps
    if not steps or len(scores) < 2:
        return None

    def train(names: tuple[str, ...]) -> dict[str, float]:
        tell(f"transfer: {' and '.join(names)}, {steps} steps each")
        some = subset(prepared, names)
        # A pair takes twice the steps, so that each of its tasks is given as many rows as alone.
        place = folder / "single" / ("transfer-" + "+".join(names))
        if fit(some, place, steps * len(names)).stopped == "interrupted":
            raise KeyboardInterrupt
        return {name: score.value for name, score in _test(some).items()}

    better = {name: score.higher_is_better for name, score in scores.items()}
    return transfer_matrix(tuple(scores), train, better, cache=folder / "transfer.json")


def _rows_spent(folder: Path) -> tuple[float, float]:
    """Labelled rows of the multitask run, and of all single-task models together."""
    alone = [
        _read_ledger(path.parent)
        for path in (folder / "single").glob("*/ledger.json")
        if not path.parent.name.startswith("transfer-")
    ]
    return _total(_read_ledger(folder)), sum(map(_total, alone))


def _rows_drawn(prepared: Prepared, folder: Path) -> dict[str, int]:
    """Rows that each task's group was given, those without a label for the task included."""
    drawn = {row["group"]: int(row["rows"]) for row in _read_ledger(folder)["mixture"]}
    return {task.name: drawn[g.name] for g in prepared.taskset.groups for task in g.tasks}


def _rounding(prepared: Prepared, folder: Path) -> float:
    """Share by which budgets may differ: 2 %, or half a step per task where runs are short."""
    half_steps = prepared.config.train.batch_size * len(prepared.taskset.tasks) / 2
    return max(0.02, half_steps / max(1.0, _total(_read_ledger(folder))))


def _total(ledger: dict[str, Any]) -> float:
    return float(sum(row["examples"] for row in ledger["tasks"] if row["task"] != "total"))


def _notes(prepared: Prepared) -> list[str]:
    """What a reader of the scores should know about the data: one line each, the worst first."""
    leaks = prepared.leaks.leaks if prepared.leaks else ()
    lines = [str(leak).partition(":\n")[0] for leak in leaks if leak.split == "test"]
    return [*lines[:5], *prepared.taskset.notes[:5]]


def _read_ledger(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "ledger.json").read_text(encoding="utf-8"))
    return record
