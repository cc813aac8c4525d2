"""Run folders and evidence as they might be, for the tests of the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from polytask.evaluate import TransferMatrix
from polytask.report import LedgerRow, MixtureRow, Range, RunScores, TaskRow
from polytask.report.layout import Transfer
from polytask.rng import generator
from polytask.study import (
    Arm,
    ArmRecord,
    Budget,
    BudgetCheck,
    Claim,
    Evidence,
    Study,
    Trial,
    Tuning,
)
from polytask.study.judge import judge_all, overall, warnings
from polytask.study.tuning import TunedPoint

TASKS: list[tuple[str, str, bool, str, float, float, float]] = [
    # task, metric, up, unit, single, gain, half width
    ("digits", "accuracy", True, "", 0.962, 0.011, 0.009),
    ("mnist", "accuracy", True, "", 0.934, 0.006, 0.008),
    ("fashion", "accuracy", True, "", 0.817, -0.004, 0.007),
    ("topics", "macro_f1", True, "", 0.711, 0.038, 0.021),
    ("languages", "accuracy", True, "", 0.902, 0.003, 0.004),
    ("docstrings", "perplexity", False, "", 41.8, 3.1, 0.9),
    ("monthly", "smape", False, "%", 13.4, 0.55, 0.35),
    ("housing", "rmse", False, "units of the target", 0.523, -0.021, 0.017),
    ("neurons", "r2", True, "", 0.341, 0.002, 0.03),
    ("a_task_with_a_rather_long_name", "mrr", True, "", 0.553, 0.024, 0.016),
]


def task_rows(count: int = 10) -> list[TaskRow]:
    rows = []
    for task, metric, up, unit, single, gain, half in TASKS[:count]:
        multitask = single + (gain if up else -gain)
        rows.append(
            TaskRow(
                task,
                metric,
                up,
                1200 + 97 * len(task),
                multitask,
                single,
                Range(gain, gain - half, gain + half),
                Range(gain / single, (gain - half) / single, (gain + half) / single),
                {metric: multitask, "log_loss": 0.4 + 0.01 * len(task)},
                unit,
            )
        )
    return rows


def scores(count: int = 10) -> RunScores:
    g = generator(0, "scores")
    names = [t[0] for t in TASKS[:count]]
    rows = g.integers(800, 9000, len(names))
    share = rows**0.5 / (rows**0.5).sum()
    some = min(count, 7)
    gain = np.round(g.normal(0.005, 0.03, (some, some)), 4)
    np.fill_diagonal(gain, 0.0)
    matrix = TransferMatrix(tuple(names[:some]), gain, np.ones(some), gain + 1, "pairs")
    return RunScores(
        tasks=task_rows(count),
        delta_m=Range(0.021, 0.009, 0.034),
        spent={"rows": (192000.0, 192000.0), "steps": (3000.0, 3000.0)},
        ledger=[
            LedgerRow(n, int(192000 * s), int(192000 * s * 40), 3.1e13 * s, 110 * s, 192000 * s / r)
            for n, s, r in zip(names, share.tolist(), rows.tolist(), strict=True)
        ],
        mixture=[
            MixtureRow(n, s, round(s * 192000) / 192000, round(s * 192000))
            for n, s in zip(names, share.tolist(), strict=True)
        ],
        policy="temperature, alpha 0.5",
        transfer=Transfer(**matrix.to_dict()),
        parameters=1_734_912,
        seconds=141.2,
        notes=["3 of 5,000 rows of 'topics' were unusable and left out (0.06 %)."],
    )


def lines(count: int = 10) -> list[dict[str, Any]]:
    g = generator(1, "lines")
    found: list[dict[str, Any]] = []
    names = [t[0] for t in TASKS[:count]]
    groups = ["stems.text", "stems.image", *(f"trunk.blocks.{i}" for i in range(6))]
    for step in range(20, 3001, 20):
        done = 1 - np.exp(-step / 700)
        terms = {
            n: {"loss": float(0.3 + 0.1 * i + 2 * (1 - done) + 0.25 * g.normal() * (1.2 - done))}
            for i, n in enumerate(names)
        }
        found.append({"step": step, "kind": "train", "loss": 1.0, "terms": terms, "lr": 1e-3})
        if step % 200 == 0:
            for task, metric, up, _, single, _, _ in TASKS[:count]:
                end = single * (1 + 0.01 * g.normal())
                value = end * (0.35 + 0.65 * done) if up else end * (2.4 - 1.4 * done)
                metrics = {"other": 1.0, metric: float(value)}
                line = {"step": step, "kind": "eval", "task": task, "split": "valid"}
                found.append({**line, "metrics": metrics})
        if step % 500 == 0:
            cosine: dict[str, Any] = {}
            for depth, group in enumerate([*groups, "all"]):
                x = g.normal(size=(count, 6)) + 0.7 * depth / len(groups)
                x /= np.linalg.norm(x, axis=1, keepdims=True)
                table = (x @ x.T).round(4).tolist()
                cosine[group] = table
            cosine["stems.image"][0] = [None] * count
            event = {"step": step, "kind": "event", "event": "conflict", "tasks": names}
            found.append({**event, "cosine": cosine})
    return found


CONFIG: dict[str, Any] = {
    "config": {
        "name": "starter",
        "seed": 0,
        "tasks": {name: {"data": f"embedded:{name}"} for name, *_ in TASKS},
        "model": {"dim": 128, "layers": 6, "heads": 4},
        "train": {"steps": 3000, "batch_size": 64, "lr": 0.001},
    },
    "environment": {
        "python": "3.11.7",
        "packages": {"polytask": "0.1.0", "torch": "2.13.0", "numpy": "2.4.6"},
        "cpus": 2,
        "commit": "1234567890ab",
    },
}


def write_run(
    folder: Path, tasks: int = 10, with_scores: bool = True, with_lines: bool = True
) -> Path:
    """A finished run's folder, or one that lacks its scores or its log."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    if with_lines:
        text = "".join(json.dumps(line) + "\n" for line in lines(tasks))
        (folder / "metrics.jsonl").write_text(text)
    if with_scores:
        (folder / "scores.json").write_text(json.dumps(scores(tasks).to_dict()))
    return folder


def evidence(correction: str = "none") -> Evidence:
    g = generator(2, "evidence")
    seeds = [10, 11, 12, 13, 14, 15]
    shared = g.normal(0, 0.02, 6)
    means = {
        "plain, equal steps": 0.617,
        "plain, three times the steps": 0.622,
        "flat, split": 0.641,
        "flat, direct": 0.634,
        "one shared perturbation": 0.624,
    }
    arms: dict[str, ArmRecord] = {}
    for i, (name, mean) in enumerate(means.items()):
        trials = []
        for k, seed in enumerate(seeds):
            accuracy = float(mean + shared[k] + 0.006 * g.normal())
            sharpness = float(0.4 - 2 * (accuracy - 0.6) + 0.01 * g.normal())
            metrics = {"accuracy": accuracy, "sharpness": sharpness}
            steps, flops = (2100, 3.3e12) if "three" in name else (700, 1.1e12 * (1 + (i > 1) * 2))
            trials.append(Trial(seed, metrics, Budget(steps, flops=flops, seconds=61.0 + 3 * k)))
        arms[name] = ArmRecord({"rho": 0.1 * i, "lr": 1e-3}, trials, "Adam, batch 128" if i else "")
    claims = (
        Claim("flat, split", "plain, equal steps", "accuracy"),
        Claim("flat, split", "plain, three times the steps", "accuracy", margin=0.005),
        Claim("flat, split", "plain, equal steps", "sharpness", higher_is_better=False),
        Claim("flat, split", "flat, direct", "accuracy", kind="ablation"),
        Claim("flat, split", "one shared perturbation", "accuracy", kind="ablation"),
    )
    study = Study("16-flat-mtl", {n: Arm(n, _never) for n in arms}, claims, Budget(steps=700))
    judgements = judge_all(study.claims, arms, correction)
    verdict, reason = overall(judgements)
    points = [TunedPoint({"rho": r}, [0.6 + r / 9], 0.6 + r / 9, Budget(700)) for r in (0.1, 0.3)]
    return Evidence(
        name="16-flat-mtl",
        title="Flat regions for multitask learning",
        size="full",
        verdict=verdict,
        reason=reason,
        seeds=seeds,
        arms=arms,
        judgements=judgements,
        budget=Budget(steps=700),
        budget_checks=[
            BudgetCheck("flat, split", "plain, equal steps", "steps", 700, 700, 0.0, 0.0, 10),
            BudgetCheck(
                "flat, split",
                "plain, three times the steps",
                "flops",
                3.3e12,
                3.28e12,
                0.006,
                0.02,
                12,
            ),
        ],
        correction="holm" if correction == "holm" else "none",
        environment=CONFIG["environment"],
        code="0123456789abcdef",
        started="2026-11-24T06:00:00+00:00",
        seconds=1893.0,
        reused=3,
        warnings=warnings(judgements, arms),
        tuning=Tuning(
            "accuracy",
            True,
            [1000, 1001],
            {"rho": [0.1, 0.3]},
            {},
            dict.fromkeys(arms, points),
            {n: {"rho": 0.3} for n in arms},
        ),
        notes={
            "regime": "chosen on seeds 0 to 4, confirmed on these",
            "reported": ["with 2,000 pairs the gain is gone"],
        },
    )


def _never(seed: int, budget: Budget) -> Any:
    raise AssertionError("samples are not run")
