"""Pictures of a run: one idea each.

gains      who gains from training together: relative gain per task with its interval
dumbbell   the values behind it: single-task and multitask per task, on the metric's own axis
curves     validation metric per task over steps; losses per task over steps
conflict   do the tasks' gradients pull the same way, per pair and per part of the model
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
from polytask.report.layout import MixtureRow, RunScores, Transfer
from polytask.report.words import metric_name, number, percent, plain_metric, verdict

_SHARES = {
    "accuracy", "pixel_accuracy", "macro_f1", "micro_f1", "auroc", "mean_average_precision",
    "exact_match", "token_f1", "rouge_l", "mrr", "miou", "hamming", "recall@1", "recall@5",
    "recall@10",
}  # fmt: skip
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
    """Single-task and multitask values: shares on one axis of their own; metrics with units, which
    have no common axis, as change in per cent with the values written beside."""
    rows = [t for t in scores.tasks if t.single is not None and t.multitask is not None]
    shares = [t for t in rows if t.metric in _SHARES]
    others = [t for t in rows if t.metric not in _SHARES and t.single]
    panels = [part for part in (shares, others) if part]
    if not panels:
        return None
    heights = [0.75 + 0.34 * len(part) for part in panels]
    with style() as figure_class:
        figure = figure_class(figsize=(WIDTH, sum(heights) + 0.35), layout="constrained")
        axes = np.atleast_1d(figure.subplots(len(panels), 1, height_ratios=heights))
        for ax, part in zip(axes, panels, strict=True):
            for y, t in enumerate(part):
                single, multi = float(t.single or 0.0), float(t.multitask or 0.0)
                at = (single, multi) if part is shares else (0.0, 100 * (multi / single - 1))
                _pair(ax, at, y, looks[t.task])
                if part is others:
                    said = f"{number(single)} → {number(multi)}"
                    ax.text(
                        1.01,
                        y,
                        said,
                        transform=ax.get_yaxis_transform(),
                        va="center",
                        fontsize=8.5,
                        color=SOFT,
                    )
            named = [f"{short(t.task)} · {metric_name(t.metric, t.higher_is_better)}" for t in part]
            _rows_axis(ax, named)
            ax.grid(axis="y", visible=False)
            ax.margins(x=0.08)
            ax.set_xlabel("value" if part is shares else "change of the value, %")
        for label, face in (("one model per task", PAPER), ("one model for all tasks", SOFT)):
            axes[0].plot([], [], "o", ms=8, mfc=face, mec=SOFT, mew=2, label=label)
        axes[0].legend(
            loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, borderaxespad=0.2, handletextpad=0.2
        )
        caption = (
            "Both were judged on the same rows. Arrows after a metric's name say which way is "
            "better; whether a difference is more than chance is in the picture above."
        )
        return finish(figure, folder, "dumbbell", "Multitask and single-task models", caption)


def _pair(ax: Any, at: tuple[float, float], y: int, look: Look) -> None:
    ax.plot(at, [y, y], color=look.colour, lw=2.6, alpha=0.5)
    ax.plot(at[:1], [y], look.marker, ms=8, mfc=PAPER, mec=look.colour, mew=2)
    ax.plot(at[1:], [y], look.marker, ms=9, color=look.colour)


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
                ax.plot(x, _smoothed(y), color=colour, ls=looks[task].dash)
            else:
                marker = looks[task].marker if len(y) < 25 else ""
                ax.plot(x, y, color=colour, ls=looks[task].dash, marker=marker, ms=3.5)
            ax.set_title(titles.get(task, short(task, 24)), fontsize=9, color=INK, pad=3)
            ax.margins(y=0.12)
            ax.locator_params(axis="y", nbins=4)
            ax.locator_params(axis="x", nbins=4)
            if i + columns >= len(found):
                ax.set_xlabel("step")
                ax.tick_params(labelbottom=True)
        return finish(figure, folder, name, title, caption)


def _smoothed(values: Any) -> Any:
    """Centred mean over about a tenth of the curve; the window shrinks at both ends."""
    half = max(1, len(values) // 20)
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    at = np.arange(len(values))
    reach = np.minimum(half, np.minimum(at, len(values) - 1 - at))
    first, last = at - reach, at + reach + 1
    count = counts[last] - counts[first]
    return np.where(count > 0, (sums[last] - sums[first]) / np.maximum(count, 1), np.nan)


def conflict_map(tasks: Sequence[str], mean: Any, logged: int, folder: Path) -> Picture:
    """Cosine of every two tasks' gradients over all shared parameters, each pair once."""
    table = np.asarray(mean, float).copy()
    table[np.triu_indices(len(tasks))] = np.nan
    size = 0.5 * len(tasks) + 1.2
    with style() as figure_class:
        figure = figure_class(figsize=(min(WIDTH, size + 1.2), size), layout="constrained")
        ax = figure.subplots()
        _map(ax, table[1:, :-1], tasks[1:], tasks[:-1], lambda v: number(v, 2), 1.0)
        caption = (
            f"Cosine of two tasks' gradients, mean over {logged} logged steps. Below 0 (rust): a "
            "step for one undoes part of the other's. 0: they do not touch. 1 (blue): the same "
            "direction."
        )
        return finish(figure, folder, "conflict", "Gradient conflict between tasks", caption)


def conflict_parts(tasks: int, mean: Mapping[str, Any], folder: Path) -> Picture | None:
    """The same per part of the model: one dot per pair of tasks."""
    parts = [name for name in mean if name != "all"]
    if not parts:
        return None
    below = np.tril_indices(tasks, -1)
    with style() as figure_class:
        figure = figure_class(figsize=(WIDTH, 0.9 + 0.33 * len(parts)))
        ax = figure.subplots()
        for y, name in enumerate(parts):
            values = np.asarray(mean[name], float)[below]
            values = values[np.isfinite(values)]
            colours = [WORSE if v < 0 else BETTER for v in values]
            ax.scatter(values, [y] * len(values), s=20, c=colours, alpha=0.4, lw=0)
            if len(values):
                ax.plot([values.mean()], [y], "|", ms=14, mew=2.6, color=INK)
        ax.axvline(0, color=INK, lw=1)
        _rows_axis(ax, [short(name, 24) for name in parts])
        ax.set_xlabel("cosine of two tasks' gradients")
        ax.grid(axis="y", visible=False)
        caption = "By part of the model: a dot per pair of tasks, the bar is their mean."
        return finish(figure, folder, "conflict-parts", "Gradient conflict by part", caption)


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
        bare = lambda v: percent(v).removesuffix("\u202f%")
        _map(ax, shown, found.tasks, found.tasks, bare, most)
        ax.set_xlabel("... changes this task, %")
        ax.set_ylabel("adding this task ...")
        with_j = "together with" if found.mode == "pairs" else "instead of on"
        caption = (
            f"Relative gain of the column's task when training on the row's task {with_j} it, "
            "against training on it alone under the same budget. Blue: helps. Rust: harms."
        )
        return finish(figure, folder, "transfer", "Who helps whom", caption)


def _map(
    ax: Any, values: Any, down: Sequence[str], across: Sequence[str], show: Any, most: float
) -> None:
    """A heat map (down, across) on the diverging scale with its numbers written in."""
    colours = diverging()
    rows, columns = len(down), len(across)
    masked = np.ma.masked_invalid(values)
    edges = np.arange(columns + 1) - 0.5, np.arange(rows + 1) - 0.5
    ax.pcolormesh(
        *edges, masked, cmap=colours, vmin=-most, vmax=most, edgecolors=PAPER, linewidth=1.5
    )
    for i, j in np.argwhere(np.isfinite(values)):
        rgba = colours((values[i, j] / most + 1) / 2)
        ax.text(
            j,
            i,
            show(values[i, j]),
            ha="center",
            va="center",
            color=ink_on(rgba),
            fontsize=8 if columns > 6 else 9,
        )
    ax.set_xticks(
        range(columns),
        [short(name, 16) for name in across],
        rotation=35,
        ha="right",
        rotation_mode="anchor",
    )
    ax.set_yticks(range(rows), [short(name, 16) for name in down])
    ax.tick_params(labelcolor=INK)
    ax.set_ylim(rows - 0.5, -0.5)
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
                f"{100 * row.realised:.1f}",
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
