"""The pictures of a merge: who is in it where, how the models disagree, what scale does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from polytask.report.drawing import (
    INK,
    PAPER,
    SOFT,
    WIDTH,
    Picture,
    diverging,
    finish,
    ink_on,
    looks,
    short,
    style,
)
from polytask.report.words import number

_KINDS = 14  # rows of a map; the largest kinds of tensor, the others together
Rows = Sequence[Mapping[str, Any]]


def coefficient_map(rows: Rows, models: Sequence[str], folder: Path) -> Picture | None:
    """Models down, layers across: how much of each model is in the merge."""
    known = [row for row in rows if row["coefficients"] is not None]
    if not known:
        return None
    places = _layers(known)
    table = np.array(
        [
            [
                _mean([(r["coefficients"][k], r["count"]) for r in known if _at(r, p)])
                for p in places
            ]
            for k in range(len(models))
        ]
    )
    # One colour for zero and one for the usual top, so that maps can be compared.
    most = max(1.0, float(np.nanmax(np.abs(table))) if np.isfinite(table).any() else 1.0)
    height = 1.1 + 0.42 * len(models)
    with style() as figure_class:
        figure = figure_class(figsize=(WIDTH, height), layout="constrained")
        ax = figure.subplots()
        image = _map(ax, table, models, places, diverging(), -most, most)
        _bar(figure, ax, image, "coefficient")
        ax.set_xlabel("layer")
        caption = (
            "How much of each model is in the merge: the least-squares coefficients of the task "
            "vectors, by layer ('rest': tensors outside layers). For plain sums they are the "
            "weights; trimming, masks and votes make them smaller."
        )
        return finish(figure, folder, "coefficients", "Who is in the merge", caption)


def disagreement_maps(rows: Rows, folder: Path) -> list[Picture]:
    """Kinds of tensor down, layers across: the change that cancels, and shared places."""
    told = (
        (
            "conflict",
            "Sign conflict",
            "Share of all change that cancels when the task vectors are added up. 0: they agree "
            "in sign everywhere; 0.5: half of the change is lost. Methods with a vote decide "
            "these coordinates.",
        ),
        (
            "overlap",
            "Overlap",
            "How far the models change the same places: the largest fifth of each task vector, "
            "what two have in common over what either has, mean over pairs. Random places: 0.11.",
        ),
    )
    return [p for p in (_kind_map(rows, *t, folder) for t in told) if p is not None]


def _kind_map(rows: Rows, key: str, title: str, caption: str, folder: Path) -> Picture | None:
    known = [row for row in rows if math.isfinite(row[key])]
    if not known:
        return None
    places, kinds = _layers(known), _kinds(known)
    table = np.array(
        [
            [
                _mean([(r[key], r["count"]) for r in known if _at(r, p) and kinds[r["kind"]] == k])
                for p in places
            ]
            for k in dict.fromkeys(kinds.values())
        ]
    )
    names = list(dict.fromkeys(kinds.values()))
    with style() as figure_class:
        figure = figure_class(figsize=(WIDTH, 1.2 + 0.27 * len(names)), layout="constrained")
        ax = figure.subplots()
        image = _map(ax, table, names, places, _rising(), 0.0, 1.0)
        _bar(figure, ax, image, key)
        ax.set_xlabel("layer")
        return finish(figure, folder, key, title, caption)


def size_lines(rows: Rows, models: Sequence[str], folder: Path) -> Picture | None:
    """How far each model moved from the base, by layer."""
    layers = sorted({row["layer"] for row in rows if row["layer"] is not None})
    if len(layers) < 2:
        return None
    own = looks(models)
    with style() as figure_class:
        figure = figure_class(figsize=(WIDTH, 2.7), layout="constrained")
        ax = figure.subplots()
        for k, name in enumerate(models):
            values = [
                _mean([(r["sizes"][k], r["count"]) for r in rows if r["layer"] == layer])
                for layer in layers
            ]
            look = own[name]
            marker = look.marker if len(layers) < 25 else ""
            ax.plot(layers, values, color=look.colour, ls=look.dash, marker=marker, ms=4.5)
            ax.plot([], [], color=look.colour, ls=look.dash, marker=marker, label=short(name))
        ax.set_ylim(bottom=0)
        ax.locator_params(axis="x", integer=True)
        ax.set_xlabel("layer")
        ax.set_ylabel("distance from the base,\nshare of its length")
        ax.legend(ncols=min(4, len(models)), loc="lower left", bbox_to_anchor=(0, 1))
        caption = (
            "Length of each task vector over the base's own, mean over a layer's values. A model "
            "far above the others weighs more at equal weights."
        )
        return finish(figure, folder, "sizes", "How far each model moved", caption)


def scale_curves(compared: Mapping[str, Any], folder: Path) -> Picture | None:
    """Each task's metric along base + s (merge - base)."""
    points = compared["scales"]
    if len(points) < 2:
        return None
    scales = [point[0] for point in points]
    tasks = [row["task"] for row in compared["rows"]]
    own = looks(tasks)
    with style() as figure_class:
        figure = figure_class(figsize=(WIDTH, 3.3), layout="constrained")
        ax = figure.subplots()
        for task in tasks:
            values = [point[1][task] for point in points]
            look = own[task]
            ax.plot(scales, values, color=look.colour, ls=look.dash, marker=look.marker, ms=4)
            ax.plot([], [], color=look.colour, ls=look.dash, marker=look.marker, label=short(task))
        metrics = {row["metric"] for row in compared["rows"]}
        if len(metrics) == 1 and len(tasks) > 1:
            mean = [float(np.mean([p[1][t] for t in tasks])) for p in points]
            ax.plot(scales, mean, color=INK, lw=2.6, label="mean of tasks")
        ax.axvline(1, color=SOFT, lw=0.9)
        ax.annotate(
            "the merge", (1, 0.95), xycoords=("data", "axes fraction"), xytext=(4, 0),
            textcoords="offset points", fontsize=8.5, color=SOFT,
        )  # fmt: skip
        ax.set_xlabel("scale s of base + s (merge − base)")
        ax.set_ylabel(metrics.pop().replace("_", " ") if len(metrics) == 1 else "metric")
        ax.legend(ncols=min(4, len(tasks) + 1), loc="lower left", bbox_to_anchor=(0, 1))
        caption = (
            "What the strength of the merge does to every task. A peak left of 1 says that the "
            "merge goes too far, one right of it that it stops short; on test rows this is "
            "a look, not a way to choose."
        )
        return finish(figure, folder, "scales", "Metric against scale", caption)


def trace_curves(traces: Mapping[str, Any], folder: Path) -> list[Picture]:
    """Learning curves by name: {'entropy': {'all': [..], 'task': [..]}}, one value a step."""
    found = []
    for what, series in traces.items():
        own = looks(list(series))
        with style() as figure_class:
            figure = figure_class(figsize=(WIDTH, 2.8), layout="constrained")
            ax = figure.subplots()
            for name, values in series.items():
                steps = range(1, len(values) + 1)
                ax.plot(steps, values, color=own[name].colour, ls=own[name].dash, label=short(name))
            ax.set_xlabel("step")
            ax.set_ylabel(str(what).replace("_", " "))
            ax.legend(ncols=min(4, len(series)), loc="lower left", bbox_to_anchor=(0, 1))
            title = str(what).replace("_", " ").capitalize()
            caption = f"{title} while the coefficients were learned, one value a step."
            slug = "".join(c if c.isalnum() else "-" for c in str(what).lower())
            found.append(finish(figure, folder, f"trace-{slug}", title, caption))
    return found


def _layers(rows: Rows) -> list[int | None]:
    """Layers in order, then None where there are tensors outside them."""
    found = {row["layer"] for row in rows}
    inside: list[int | None] = [*sorted(layer for layer in found if layer is not None)]
    return [*inside, None] if None in found else inside


def _at(row: Mapping[str, Any], place: int | None) -> bool:
    return bool(row["layer"] == place)


def _kinds(rows: Rows) -> dict[str, str]:
    """Kind of tensor -> row of the map. Small kinds share one."""
    counts: dict[str, int] = {}
    inside: dict[str, bool] = {}
    for row in rows:
        counts[row["kind"]] = counts.get(row["kind"], 0) + row["count"]
        inside[row["kind"]] = inside.get(row["kind"], False) or row["layer"] is not None
    kept = sorted(counts, key=lambda k: -counts[k])[:_KINDS]
    order = [k for k in counts if k in kept and inside[k]] + [
        k for k in counts if k in kept and not inside[k]
    ]
    return {k: k for k in order} | {k: "others" for k in counts if k not in kept}


def _mean(pairs: Sequence[tuple[float, int]]) -> float:
    known = [(value, count) for value, count in pairs if math.isfinite(value)]
    weight = sum(count for _, count in known)
    return sum(value * count for value, count in known) / weight if weight else float("nan")


def _rising() -> Any:
    """From paper to rust: nothing to much."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("polytask-rising", ["#f3f1ee", "#b2552b", "#5e2410"])


def _map(
    ax: Any,
    table: Any,
    down: Sequence[str],
    across: Sequence[int | None],
    colours: Any,
    low: float,
    high: float,
) -> Any:
    rows, columns = table.shape
    edges = np.arange(columns + 1) - 0.5, np.arange(rows + 1) - 0.5
    image = ax.pcolormesh(
        *edges,
        np.ma.masked_invalid(table),
        cmap=colours,
        vmin=low,
        vmax=high,
        edgecolors=PAPER,
        linewidth=1.2 if columns <= 40 else 0.0,
    )
    if columns <= 14:
        for i, j in np.argwhere(np.isfinite(table)):
            rgba = colours((table[i, j] - low) / (high - low))
            ax.text(
                j, i, number(float(table[i, j]), 2), ha="center", va="center",
                color=ink_on(rgba), fontsize=8,
            )  # fmt: skip
    step = max(1, -(-columns // 20))
    ticks = [j for j in range(columns) if across[j] is None or j % step == 0]
    ax.set_xticks(ticks, ["rest" if across[j] is None else str(across[j]) for j in ticks])
    ax.set_yticks(range(rows), [short(name, 34) for name in down])
    ax.tick_params(labelcolor=INK, labelsize=8.5)
    ax.set_ylim(rows - 0.5, -0.5)
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return image


def _bar(figure: Any, ax: Any, image: Any, label: str) -> None:
    bar = figure.colorbar(image, ax=ax, fraction=0.035, pad=0.015, aspect=14)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, labelcolor=SOFT)
    bar.set_label(label, color=SOFT, fontsize=8.5)
