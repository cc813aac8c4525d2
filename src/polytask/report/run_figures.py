"""Pictures of a run: one idea each.

gains      who gains from training together: relative gain per task with its interval
dumbbell   the values behind it: single-task and multitask per task, on the metric's own axis
curves     validation metric per task over steps; losses per task over steps
conflict   do the tasks' gradients pull the same way, per pair and per layer group
transfer   who helps whom
mixture    what the policy asked for and what was drawn
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from polytask.report.drawing import (
    BETTER,
    GRID,
    INK,
    PAPER,
    SOFT,
    WIDTH,
    WORSE,
    Look,
    Picture,
    diverging,
    finish,
    ink_on,
    short,
    style,
)
from polytask.report.layout import MixtureRow, RunScores, TaskRow, Transfer
from polytask.report.words import metric_name, number, percent, plain_metric, verdict

_SIDE = {"better": BETTER, "worse": WORSE, "same": SOFT, "": SOFT}


def gains(scores: RunScores, folder: Path) -> Picture | None:
    """Relative gains with intervals, best first, the mean of all tasks below."""
    rows = [t for t in scores.tasks if t.relative is not None and t.relative.mean is not None]
    if not rows:
        return None
    rows.sort(key=lambda t: -(t.relative.mean or 0.0) if t.relative else 0.0)
    entries = [(short(t.task), t.relative, False) for t in rows]
    if scores.delta_m is not None and scores.delta_m.mean is not None:
        entries.append(("mean of all tasks", scores.delta_m, True))
    with style() as figure_class:
        figure = figure_class(figsize=(WIDTH, 1.0 + 0.34 * len(entries)))
        ax = figure.subplots()
        for y, (_, found, whole) in enumerate(entries):
            assert found is not None and found.mean is not None
            colour = INK if whole else _SIDE[verdict(found)]
            low = found.mean if found.low is None else found.low
            high = found.mean if found.high is None else found.high
            ax.plot(
                [100 * low, 100 * high],
                [y, y],
                color=colour,
                lw=5 if whole else 2.4,
                solid_capstyle="round",
                alpha=0.35 if whole else 1.0,
            )
            ax.plot(
                [100 * found.mean],
                [y],
                marker="D" if whole else "o",
                ms=8,
                color=colour,
                mec=PAPER,
                mew=1.2,
            )
        ax.axvline(0, color=INK, lw=1)
        if len(entries) > len(rows):
            ax.axhline(len(rows) - 0.5, color=GRID, lw=1)
        _rows_axis(ax, [name for name, _, _ in entries])
        ax.set_xlabel(
            f"gain over the single-task model, % of its value  "
            f"({scores.confidence:.0%} interval over {scores.over})"
        )
        ax.grid(axis="y", visible=False)
        caption = (
            "Right of the line: the multitask model is better. Blue and rust mark intervals that "
            "exclude zero; grey ones hold it."
        )
        return finish(figure, folder, "gains", "Gain from training together", caption)


def dumbbell(scores: RunScores, looks: Mapping[str, Look], folder: Path) -> Picture | None:
    """Single-task and multitask values, one panel per metric (per task where units differ)."""
    rows = [t for t in scores.tasks if t.single is not None and t.multitask is not None]
    if not rows:
        return None
    panels: dict[str, list[TaskRow]] = {}
    for t in rows:
        own = t.unit.startswith("units")
        panels.setdefault(f"{t.metric}/{t.task}" if own else t.metric, []).append(t)
    heights = [0.62 + 0.34 * len(tasks) for tasks in panels.values()]
    with style() as figure_class:
        figure = figure_class(figsize=(WIDTH, sum(heights) + 0.35), layout="constrained")
        axes = np.atleast_1d(figure.subplots(len(panels), 1, height_ratios=heights))
        for ax, tasks in zip(axes, panels.values(), strict=True):
            for y, t in enumerate(tasks):
                colour = looks[t.task].colour
                ax.plot([t.single, t.multitask], [y, y], color=colour, lw=2.6, alpha=0.5)
                ax.plot([t.single], [y], "o", ms=8, mfc=PAPER, mec=colour, mew=2)
                ax.plot([t.multitask], [y], "o", ms=9, color=colour)
            _rows_axis(ax, [short(t.task) for t in tasks])
            unit = f", {tasks[0].unit}" if tasks[0].unit else ""
            better = "right" if tasks[0].higher_is_better else "left"
            ax.set_xlabel(f"{plain_metric(tasks[0].metric)}{unit}   ({better} is better)")
            ax.grid(axis="y", visible=False)
            ax.margins(x=0.08)
        axes[0].plot([], [], "o", ms=8, mfc=PAPER, mec=SOFT, mew=2, label="one model per task")
        axes[0].plot([], [], "o", ms=9, color=SOFT, label="one model for all tasks")
        axes[0].legend(
            loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, borderaxespad=0.2, handletextpad=0.2
        )
        caption = (
            "Both models were judged on the same rows; hollow: single-task, filled: multitask."
        )
        return finish(figure, folder, "dumbbell", "Multitask and single-task models", caption)


def _rows_axis(ax: Any, names: Sequence[str]) -> None:
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(axis="y", labelcolor=INK, labelsize=9.5)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.spines["left"].set_visible(False)


Curves = Mapping[str, tuple[Sequence[float], Sequence[float]]]


def curves(
    found: Curves,
    titles: Mapping[str, str],
    looks: Mapping[str, Look],
    folder: Path,
    name: str,
    title: str,
    caption: str,
    smooth: bool,
) -> Picture | None:
    """Small multiples: one panel per task, a common axis of steps."""
    if not found:
        return None
    columns = min(3, len(found))
    lines = -(-len(found) // columns)
    with style() as figure_class:
        figure = figure_class(figsize=(WIDTH, 0.45 + 1.75 * lines), layout="constrained")
        axes = figure.subplots(lines, columns, sharex=True, squeeze=False)
        for ax in axes.flat[len(found) :]:
            ax.set_visible(False)
        for i, (task, (steps, values)) in enumerate(found.items()):
            ax, colour = axes.flat[i], looks[task].colour
            x, y = np.asarray(steps, float), np.asarray(values, float)
            if smooth and len(y) > 8:
                ax.plot(x, y, color=colour, lw=0.8, alpha=0.3)
                ax.plot(x, _smoothed(y), color=colour)
            else:
                ax.plot(x, y, color=colour, marker="o" if len(y) < 25 else "", ms=3.5)
            ax.set_title(titles.get(task, short(task, 24)), fontsize=9, color=INK, pad=3)
            ax.margins(y=0.12)
            ax.locator_params(axis="y", nbins=4)
            ax.locator_params(axis="x", nbins=4)
            if i + columns >= len(found):
                ax.set_xlabel("step")
                ax.tick_params(labelbottom=True)
        return finish(figure, folder, name, title, caption)


def _smoothed(values: Any) -> Any:
    """Exponential mean over about a fifteenth of the curve, corrected for its start."""
    keep = 1 - 1 / max(2.0, len(values) / 15)
    out, total, weight = np.empty(len(values)), 0.0, 0.0
    for i, value in enumerate(values):
        if np.isfinite(value):
            total, weight = keep * total + value, keep * weight + 1
        out[i] = total / weight if weight else np.nan
    return out


def conflict(
    tasks: Sequence[str], mean: Mapping[str, Any], logged: int, folder: Path
) -> Picture | None:
    """Cosines of the tasks' gradients: all parameters as a map, layer groups as a strip."""
    if len(tasks) < 2 or "all" not in mean:
        return None
    groups = [g for g in mean if g != "all"]
    off = ~np.eye(len(tasks), dtype=bool)
    with style() as figure_class:
        side = 0.42 * len(tasks) + 1.4
        height = max(side, 0.27 * len(groups) + 1.2)
        figure = figure_class(figsize=(WIDTH, height), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])
        _map(left, np.asarray(mean["all"], float), tasks, lambda v: f"{v:.2f}", 1.0)
        left.set_title("cosine of two tasks' gradients")
        for y, group in enumerate(groups):
            table = np.asarray(mean[group], float)[off]
            table = table[np.isfinite(table)]
            colours = [WORSE if v < 0 else BETTER for v in table]
            right.scatter(table, [y] * len(table), s=14, c=colours, alpha=0.45, lw=0)
            if len(table):
                right.plot([table.mean()], [y], "|", ms=13, mew=2.4, color=INK)
        right.axvline(0, color=INK, lw=1)
        _rows_axis(right, [short(g, 20) for g in groups])
        right.set_xlabel("cosine, one dot per pair of tasks")
        right.set_title("by part of the model")
        right.grid(axis="y", visible=False)
        caption = (
            f"Mean over {logged} logged steps. Negative (rust): a step for one task undoes part of "
            "the other's; 0: they do not touch. The bar marks the mean over pairs."
        )
        return finish(figure, folder, "conflict", "Gradient conflict", caption)


def transfer(found: Transfer, folder: Path) -> Picture:
    """Task x task: what the row's task does for the column's."""
    gain = np.array([[np.nan if v is None else v for v in row] for row in found.gain], float)
    off = gain[~np.eye(len(gain), dtype=bool)]
    known = np.abs(off[np.isfinite(off)])
    most = max(float(known.max()) if known.size else 0.0, 0.01)
    shown = np.where(np.eye(len(gain), dtype=bool), np.nan, gain)
    size = 0.62 * len(gain) + 1.7
    with style() as figure_class:
        figure = figure_class(figsize=(min(WIDTH, size + 0.9), size), layout="constrained")
        ax = figure.subplots()
        _map(ax, shown, found.tasks, lambda v: percent(v).replace("\u202f%", ""), most)
        ax.set_xlabel("... changes this task, %")
        ax.set_ylabel("adding this task ...")
        with_j = "together with" if found.mode == "pairs" else "instead of on"
        caption = (
            f"Relative gain of the column's task when training on the row's task {with_j} it, "
            "against training on it alone under the same budget. Blue: helps. Rust: harms."
        )
        return finish(figure, folder, "transfer", "Who helps whom", caption)


def _map(ax: Any, values: Any, names: Sequence[str], show: Any, most: float) -> None:
    """A heat map on the diverging scale with its numbers written in."""
    colours = diverging()
    n = len(names)
    masked = np.ma.masked_invalid(values)
    ax.pcolormesh(
        np.arange(n + 1) - 0.5,
        np.arange(n + 1) - 0.5,
        masked,
        cmap=colours,
        vmin=-most,
        vmax=most,
        edgecolors=PAPER,
        linewidth=1.5,
    )
    for i in range(n):
        for j in range(n):
            if np.isfinite(values[i, j]):
                rgba = colours((values[i, j] / most + 1) / 2)
                ax.text(
                    j,
                    i,
                    show(values[i, j]).replace("-", "\u2212"),
                    ha="center",
                    va="center",
                    fontsize=8 if n > 6 else 9,
                    color=ink_on(rgba),
                )
    ax.set_xticks(
        range(n),
        [short(name, 16) for name in names],
        rotation=35,
        ha="right",
        rotation_mode="anchor",
    )
    ax.set_yticks(range(n), [short(name, 16) for name in names])
    ax.tick_params(labelcolor=INK)
    ax.set_ylim(n - 0.5, -0.5)
    ax.set_aspect("equal")
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set_visible(False)


def mixture(rows: Sequence[MixtureRow], policy: str, folder: Path) -> Picture | None:
    """Shares of rows: asked for and drawn."""
    if not rows:
        return None
    with style() as figure_class:
        figure = figure_class(figsize=(WIDTH, 0.95 + 0.3 * len(rows)))
        ax = figure.subplots()
        for y, row in enumerate(rows):
            ax.barh(y, 100 * row.realised, height=0.62, color="#4477AA", alpha=0.8)
            ax.plot([100 * row.policy] * 2, [y - 0.42, y + 0.42], color=INK, lw=2.2)
            ax.annotate(
                number(100 * row.realised, 1),
                (100 * max(row.realised, row.policy), y),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
                color=SOFT,
            )
        _rows_axis(ax, [short(row.group) for row in rows])
        ax.set_xlabel("share of rows, %")
        ax.set_xlim(left=0)
        ax.margins(x=0.1)
        ax.grid(axis="y", visible=False)
        name = f" ({policy})" if policy else ""
        caption = f"Bars: what was drawn. Marks: what the policy{name} asked for."
        return finish(figure, folder, "mixture", "Mixture", caption)


def curve_titles(scores: RunScores | None, metric_of: Mapping[str, str]) -> dict[str, str]:
    """'task: metric' with the better direction, where it is known."""
    up = {t.metric: t.higher_is_better for t in scores.tasks} if scores else {}
    return {
        task: f"{short(task, 18)}: "
        + (metric_name(metric, up[metric]) if metric in up else plain_metric(metric))
        for task, metric in metric_of.items()
    }
