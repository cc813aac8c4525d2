"""`run_report`: the page of a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from polytask import files
from polytask.report import page as html
from polytask.report import run_figures as draw
from polytask.report.drawing import looks
from polytask.report.layout import RunData, RunScores, read_run
from polytask.report.words import (
    amount,
    duration,
    interval,
    number,
    percent,
    plain_metric,
    score_rows,
    verdict,
)


def run_report(folder: Path | str, out: Path | str | None = None) -> Path:
    """Write report.html and its PNGs (into pictures/) for a run folder; returns the page's path.

    Reads config.json, metrics.jsonl and scores.json (see `polytask.report.layout`); what a run
    does not have is left out of the page. `out`: folder to write to, default the run's own.
    """
    source = Path(folder)
    target = source if out is None else Path(out)
    data = read_run(source)
    pictures = target / "pictures"
    tasks = _task_names(data)
    look = looks(tasks)
    scores = data.scores
    parts = [_head(data), _headline(scores, pictures)]
    if scores is not None:
        parts.append(
            html.section(
                "The two models side by side",
                html.figure(draw.dumbbell(scores, look, pictures)),
            )
        )
    parts += [_learning(data, look, pictures), _conflict(data, pictures)]
    if scores is not None and scores.transfer is not None:
        picture = draw.transfer(scores.transfer, pictures)
        parts.append(html.section("Who helps whom", html.figure(picture)))
    if scores is not None:
        parts += [_spending(scores, pictures), _all_metrics(scores)]
    parts.append(_origin(data))
    path = target / "report.html"
    files.write_text(path, html.page(f"{data.name} · polytask", parts))
    return path


def _task_names(data: RunData) -> list[str]:
    """Tasks in the order of the scores, then of the configuration, then as they are logged."""
    names = [t.task for t in data.scores.tasks] if data.scores else []
    configured = data.config.get("tasks")
    names += list(configured) if isinstance(configured, Mapping) else []
    for line in data.lines:
        names += [str(line["task"])] if line.get("kind") == "eval" else list(line.get("terms", {}))
    return list(dict.fromkeys(names))


def _head(data: RunData) -> str:
    steps = max((int(line["step"]) for line in data.lines), default=0)
    facts = []
    if data.scores is not None:
        facts.append(f"{len(data.scores.tasks)} tasks")
        if data.scores.parameters:
            facts.append(f"{amount(data.scores.parameters)} parameters")
    if steps:
        facts.append(f"{steps:,} steps")
    if data.scores is not None and data.scores.seconds:
        facts.append(duration(data.scores.seconds))
    kicker = html.paragraph(" · ".join(["polytask run", *facts]), "kicker")
    return f"{kicker}\n<h1>{escape(data.name)}</h1>"


def _headline(scores: RunScores | None, pictures: Path) -> str:
    """What came out, in a sentence, a table and a picture."""
    if scores is None:
        return html.paragraph(
            "This run has no test scores yet: it is still going on, or was stopped. Running the "
            "same command again goes on where it stopped.",
            "lead",
        )
    rows = score_rows(scores)
    compared = any(row.single != "–" for row in rows)
    heads = ["task", "metric", "test rows", "all tasks"]
    if compared:
        heads += ["alone", "gain", f"{scores.confidence:.0%} interval"]
    cells: list[list[html.Cell]] = []
    for row in rows:
        kind = row.verdict if row.verdict in ("better", "worse") else ""
        cells.append([row.task, (row.metric, "whole"), f"{row.rows:,}", row.multitask])
        if compared:
            cells[-1] += [row.single, (row.difference, kind), (row.interval, kind)]
    note = (
        "all tasks: one model for all; alone: one model per task, trained on the same rows. A gain "
        "above 0 means that the multitask model is better, whichever way the metric points."
    )
    return "\n".join(
        [
            _sentence(scores),
            html.table(heads, cells, left=2),
            html.paragraph(note, "soft small") if compared else "",
            html.figure(draw.gains(scores, pictures)),
            _notes(scores.notes),
        ]
    )


def _notes(notes: Sequence[str]) -> str:
    """A few notes stand on the page, many behind a line to open."""
    if len(notes) <= 3:
        return html.items(notes)
    return html.folded(f"{len(notes)} notes on the data", html.items(notes))


def _sentence(scores: RunScores) -> str:
    delta = scores.delta_m
    if delta is None or delta.mean is None:
        return html.paragraph(f"One model for {len(scores.tasks)} tasks.", "lead")
    kinds = [verdict(t.relative) for t in scores.tasks]
    counts = [kinds.count(k) for k in ("better", "worse", "same")]
    counted = f" Beyond chance it is better on {counts[0]} and worse on {counts[1]} of them" + (
        f"; {counts[2]} could go either way." if counts[2] else "."
    )
    kind = {"better": "better", "worse": "worse"}.get(verdict(delta), "")
    mean = f'<strong class="{kind}">{escape(percent(delta.mean))}</strong>'
    left_out = f" Without a relative gain: {', '.join(scores.left_out)}." if scores.left_out else ""
    text = (
        f"One model for {len(scores.tasks)} tasks, against one model per task: {mean} on average "
        f"({scores.confidence:.0%} interval {escape(interval(delta, percent))})."
    )
    return f'<p class="lead">{text}{escape(counted + left_out)}</p>'


def _learning(data: RunData, look: Any, pictures: Path) -> str:
    """Validation metric and training loss of each task over steps."""
    primary = {t.task: t.metric for t in data.scores.tasks} if data.scores else {}
    valid: dict[str, tuple[list[float], list[float]]] = {}
    metric_of: dict[str, str] = {}
    losses: dict[str, tuple[list[float], list[float]]] = {}
    for line in data.lines:
        if line.get("kind") == "eval" and line.get("metrics"):
            task = str(line["task"])
            wanted = metric_of.get(task) or primary.get(task, "")
            name = wanted if wanted in line["metrics"] else next(iter(line["metrics"]))
            metric_of[task] = name
            if line["metrics"][name] is not None:
                _append(valid, task, line["step"], line["metrics"][name])
        elif line.get("kind") == "train":
            for task, terms in line.get("terms", {}).items():
                known = [value for value in terms.values() if value is not None]
                if known:
                    _append(losses, str(task), line["step"], sum(known))
    order = [task for task in look if task in valid]
    valid_picture = draw.curves(
        {task: valid[task] for task in order},
        draw.curve_titles(data.scores, metric_of),
        look,
        pictures,
        "validation",
        "Validation over training",
        "Each task's primary metric on validation rows. The vertical axes differ.",
        smooth=False,
    )
    loss_picture = draw.curves(
        {task: losses[task] for task in look if task in losses},
        {},
        look,
        pictures,
        "loss",
        "Training loss per task",
        "Sum of a task's loss terms; thin: as logged, thick: smoothed. The vertical axes differ.",
        smooth=True,
    )
    return html.section("Learning", html.figure(valid_picture), html.figure(loss_picture))


def _append(
    found: dict[str, tuple[list[float], list[float]]], task: str, step: Any, value: Any
) -> None:
    steps, values = found.setdefault(task, ([], []))
    steps.append(float(step))
    values.append(float(value))


def _conflict(data: RunData, pictures: Path) -> str:
    """Mean cosine tables over all logged steps; steps may have seen different tasks."""
    import numpy as np

    logs = [line for line in data.lines if line.get("event") == "conflict"]
    if not logs:
        return ""
    tasks = list(dict.fromkeys(str(task) for line in logs for task in line["tasks"]))
    total: dict[str, Any] = {}
    count: dict[str, Any] = {}
    for line in logs:
        at = np.array([tasks.index(str(task)) for task in line["tasks"]])
        for group, rows in line["cosine"].items():
            table = np.array([[np.nan if v is None else v for v in row] for row in rows], float)
            zero = np.zeros((len(tasks), len(tasks)))
            known = np.isfinite(table)
            total.setdefault(group, zero.copy())[np.ix_(at, at)] += np.where(known, table, 0.0)
            count.setdefault(group, zero.copy())[np.ix_(at, at)] += known
    if len(tasks) < 2:
        return ""
    mean = {
        group: np.where(count[group] > 0, total[group] / np.maximum(count[group], 1), np.nan)
        for group in total
    }
    return html.section(
        "Do the tasks pull the same way?",
        html.figure(draw.conflict_map(tasks, mean["all"], len(logs), pictures)),
        html.figure(draw.conflict_parts(len(tasks), mean, pictures)),
    )


def _spending(scores: RunScores, pictures: Path) -> str:
    """The ledger, the budgets that were compared, the mixture."""
    rows: list[Sequence[html.Cell]] = [
        (
            row.task,
            amount(row.examples),
            "–" if row.epochs is None else number(row.epochs, 2),
            amount(row.tokens),
            amount(row.flops),
            duration(row.seconds),
        )
        for row in scores.ledger
    ]
    if rows:
        total = [sum(getattr(r, k) for r in scores.ledger) for k in ("examples", "tokens", "flops")]
        seconds = duration(sum(row.seconds for row in scores.ledger))
        rows.append(("total", amount(total[0]), "", *map(amount, total[1:]), seconds))
    ledger = html.table(("task", "rows", "epochs", "tokens", "FLOPs", "time"), rows, total=True)
    spent = html.table(
        ("compared budgets", "multitask", "single-task models together"),
        [(name, amount(a), amount(b)) for name, (a, b) in scores.spent.items()],
    )
    picture = draw.mixture(scores.mixture, scores.policy, pictures)
    return html.section("What was spent on what", ledger, spent, html.figure(picture))


def _all_metrics(scores: RunScores) -> str:
    rows = [
        (t.task, plain_metric(name), number(value))
        for t in scores.tasks
        for name, value in t.metrics.items()
    ]
    if not rows:
        return ""
    content = html.table(("task", "metric", "multitask model"), rows, left=2)
    return html.section("More", html.folded(f"All metrics on {scores.split}", content))


def _origin(data: RunData) -> str:
    parts = []
    if data.environment:
        parts.append(html.folded("Environment", html.environment_table(data.environment)))
    parts.append(html.folded("Configuration as resolved", html.yaml_block(data.config)))
    return "\n".join(parts)
