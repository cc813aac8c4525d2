"""Training of a prepared model: the trainer, its validation scores, and the ledger on file."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from polytask import files
from polytask.evaluate import evaluate
from polytask.mixture.ledger import Ledger
from polytask.models.flops import flops_by_task
from polytask.pipeline.prepare import Prepared
from polytask.train.config import StageConfig, TrainConfig
from polytask.train.distribution import Distribution
from polytask.train.loader import Loader
from polytask.train.trainer import Trainer, TrainResult
from polytask.train.validation import MixtureValidation


def fit(prepared: Prepared, folder: Path, steps: int | None = None) -> TrainResult:
    """Train a prepared model in `folder`; `steps` replaces the configuration's length."""
    config = prepared.config
    plan = config.train if steps is None else _shortened(config.train, steps)
    distribution = Distribution(plan.device)
    loader = prepared.loader(distribution)
    validation: MixtureValidation | None = None
    if loader.sampler.policy.validates:
        validation = validation_of(prepared, loader)
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
        work=partial(flops_by_task, prepared.model),
        validation=validation,
    )
    result = trainer.fit()
    ledger = trainer.ledger  # summed over processes, so all of them ask
    if distribution.main and ledger is not None:
        record = {"tasks": ledger.rows(), "mixture": _mixture_rows(loader, ledger)}
        files.write_json(folder / "ledger.json", record)
    return result


def validation_of(prepared: Prepared, loader: Loader) -> MixtureValidation:
    """Losses on the validation rows that are scored during training."""
    settings = prepared.config.evaluate
    return MixtureValidation(
        loader, limit=settings.max_valid or 512, batch_size=settings.batch_size
    )


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
