"""`train`: tasks, processor, model, trainer, scores, report, in that order.

open and check every task                          (before anything long)
train on the mixture                               (resumes where it stopped)
save the model
score the test split; the same for one model per task on as many rows as the task had
write the report
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from polytask import files
from polytask.errors import CheckpointError
from polytask.evaluate import TaskScore, compare_single, evaluate
from polytask.mixture.ledger import Ledger
from polytask.pipeline.config import RunConfig
from polytask.pipeline.prepare import Prepared, Say, prepare, single_task
from polytask.pipeline.run import MODEL, Run, save_model
from polytask.report.layout import MixtureRow, run_scores
from polytask.study.versions import environment
from polytask.train.config import StageConfig, TrainConfig
from polytask.train.distribution import Distribution
from polytask.train.loader import Loader
from polytask.train.trainer import Trainer, TrainResult


def train(
    config: RunConfig,
    folder: Path | str | None = None,
    base: Path = Path(),
    fresh: bool = False,
    say: Say | None = None,
) -> Run:
    """Train, judge and report; the finished run.

    Args:
        config: what to train (see `load_config`).
        folder: the run folder; runs/NAME when None. An unfinished run in it goes on where it
            stopped, a finished one is returned as it is.
        base: relative paths in the configuration start here.
        fresh: discard an earlier run in the folder.
        say: is told what is being done.

    Raises:
        UserError: whatever is wrong with configuration, data, disk or an earlier run.
        NonFiniteError: a loss or gradient became NaN or infinite; weights are unharmed.
        KeyboardInterrupt: asked to stop; everything is saved and the same call goes on.
    """
    tell = say or (lambda text: None)
    run = Run(Path("runs") / config.name if folder is None else folder)
    if fresh and run.folder.exists():
        _discard(run.folder)
    if (run.folder / "scores.json").is_file():
        _same_config(run, config)
        tell(f"{run.folder} is finished; --fresh trains it again")
        return run
    prepared = prepare(config, base, tell)
    _write_config(run.folder, prepared, base)
    result = fit(prepared, run.folder)
    if result.stopped == "interrupted":
        raise KeyboardInterrupt
    distribution = Distribution(config.train.device)
    if distribution.main:
        _judge(prepared, run, tell)
    return run


def fit(prepared: Prepared, folder: Path, steps: int | None = None) -> TrainResult:
    """Train a prepared model in `folder`; `steps` replaces the configuration's length."""
    config = prepared.config
    plan = config.train if steps is None else _shortened(config.train, steps)
    distribution = Distribution(plan.device)
    loader = prepared.loader(distribution)
    trainer = Trainer(
        prepared.model,
        loader,
        plan,
        folder,
        evaluator=_evaluator(prepared),
        identity={
            "model": config.model.model_dump(mode="json"),
            "mixture": config.mixture.model_dump(mode="json"),
            "encoding": config.encoding.model_dump(mode="json"),
        },
        distribution=distribution,
    )
    result = trainer.fit()
    ledger = trainer.ledger  # summed over processes, so all of them ask
    if distribution.main and ledger is not None:
        record = {"tasks": ledger.rows(), "mixture": _mixture_rows(loader, ledger)}
        files.write_json(folder / "ledger.json", record)
    return result


def _shortened(plan: TrainConfig, steps: int) -> TrainConfig:
    """The same recipe for a single-task model: every stage in proportion, nothing logged often."""
    quiet: dict[str, Any] = {
        "progress": False,
        "trackers": (),
        "conflict_every": 0,
        "checkpoint_every": 0,
        "aggregator": None,
        "weighting": "equal",
    }
    if plan.evaluate_every:
        share = steps / sum(stage.steps for stage in plan.plan(steps * plan.batch_size))
        quiet["evaluate_every"] = max(1, round(plan.evaluate_every * share))
    if plan.stages:
        whole = sum(stage.steps for stage in plan.stages)
        stages = tuple(
            StageConfig(
                **{
                    **stage.model_dump(),
                    "tasks": (),
                    "steps": max(1, round(stage.steps * steps / whole)),
                }
            )
            for stage in plan.stages
        )
        return plan.model_copy(update={**quiet, "stages": stages})
    return plan.model_copy(update={**quiet, "steps": steps, "epochs": None})


def _evaluator(prepared: Prepared) -> Any:
    """Scores on validation rows while training; at most `max_valid` rows a task."""
    settings = prepared.config.evaluate
    if not settings.max_valid:
        return None

    def score(model: nn.Module, step: int) -> dict[str, dict[str, float]]:
        found = evaluate(
            model,
            prepared.taskset,
            prepared.processor,
            "valid",
            settings.batch_size,
            limit=settings.max_valid,
            texts=False,
        )
        return {name: dict(task.metrics) for name, task in found.items()}

    return score


def _judge(prepared: Prepared, run: Run, tell: Say) -> None:
    """Test scores, single-task models, intervals; then the report."""
    from polytask.report import run_report

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
        parameters=sum(p.numel() for p in prepared.model.parameters()),
        notes=_notes(prepared),
    )
    if prepared.leaks is not None:
        files.write_json(run.folder / "leaks.json", prepared.leaks.to_json())
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
        alone = single_task(prepared, name)
        result = fit(alone, folder / "single" / name, steps)
        if result.stopped == "interrupted":
            raise KeyboardInterrupt
        found |= _test(alone)
    return found


def _rows_spent(folder: Path) -> tuple[float, float]:
    """Labelled rows of the multitask run, and of all single-task models together."""
    alone = [_read_ledger(path.parent) for path in (folder / "single").glob("*/ledger.json")]
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


def _mixture_rows(loader: Loader, ledger: Ledger) -> list[dict[str, Any]]:
    """What the policy granted each row group, and what it got."""
    rows: list[dict[str, Any]] = []
    first = 0
    examples = []
    for group in loader.taskset.groups:
        ids = slice(first, first + len(group.tasks))
        examples.append(int(ledger.examples[ids].max()))
        first += len(group.tasks)
    total = max(1, sum(examples))
    for group, weight, seen in zip(
        loader.taskset.groups, loader.sampler.weights, examples, strict=True
    ):
        rows.append(
            {
                "group": group.name,
                "policy": float(weight),
                "realised": seen / total,
                "rows": seen,
            }
        )
    return rows


def _write_config(folder: Path, prepared: Prepared, base: Path) -> None:
    """config.json, unless an unfinished run of another configuration is there."""
    run = Run(folder)
    if (folder / "config.json").is_file():
        _same_config(run, prepared.config)
        return
    record = {
        "config": prepared.config.resolved(),
        "base": str(base.resolve()),
        "environment": environment(),
    }
    files.write_json(folder / "config.json", record)


def _same_config(run: Run, config: RunConfig) -> None:
    old, new = run.config.resolved(), config.resolved()
    differing = [key for key in new if old.get(key) != new[key] and key != "evaluate"]
    if differing:
        raise CheckpointError(
            f"{run.folder} holds a run of another configuration ({', '.join(differing)} differ). "
            "Choose another name, or discard it with --fresh"
        )


def _discard(folder: Path) -> None:
    """Remove an earlier run; refuse a folder that is not one."""
    if not (folder / "config.json").is_file() and any(folder.iterdir()):
        raise CheckpointError(f"{folder} is not a run folder; --fresh does not remove it")
    with files.locked(folder):
        pass
    shutil.rmtree(folder)
