"""The page of a graft: does it keep the skill, is it better calibrated, and where does it lie?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from polytask import files
from polytask.report import page as html
from polytask.report.drawing import (
    BRIGHT,
    INK,
    SOFT,
    WIDTH,
    Picture,
    finish,
    ink_on,
    looks,
    short,
    style,
)

_SHOWN = 14  # kinds of module in the map


def graft_report(folder: Path, name: str, found: Mapping[str, Any]) -> Path:
    """Write report.html and its pictures into `folder`.

    Args:
        name: of the graft.
        found: what `Localized.to_dict` gives.
    """
    pictures = [bits_picture(folder, found["bits"], found["count"])]
    if found["diagrams"]:
        pictures.insert(0, reliability_picture(folder, found["diagrams"]))
    if found["trace"]:
        pictures.append(trace_picture(folder, found["trace"]))
    body = [
        html.paragraph("Skill localization", "kicker"),
        f"<h1>{escape(name)}</h1>",
        html.paragraph(_lead(found), "lead"),
        html.section("Judged on rows that chose nothing", _scores(found["scores"])),
        *(html.section(picture.title, html.figure(picture)) for picture in pictures),
        html.section("Notes", html.items(found["notes"])),
    ]
    path = folder / "report.html"
    files.write_text(path, html.page(f"Graft {name}", body))
    return path


def _lead(found: Mapping[str, Any]) -> str:
    rows = {(r["model"], r["set"]): r for r in found["scores"]}
    size = f"{found['count']:,} of {found['of']:,} parameters ({found['share']:.3%})"
    pre, tuned, graft = (
        rows[model, "test"]["accuracy"] for model in ("pretrained", "fine-tuned", "graft")
    )
    if tuned <= pre:
        return (
            f"The graft holds {size}. Fine-tuning gained no accuracy, so there is no skill to keep."
        )
    kept = (graft - pre) / (tuned - pre)
    before, after = rows["fine-tuned", "test"]["ece"], rows["graft", "test"]["ece"]
    return (
        f"{size} keep {kept:.0%} of what fine-tuning gained in accuracy. The calibration error is "
        f"{after:.3f}; that of the fine-tuned model is {before:.3f}."
    )


def _scores(rows: Sequence[Mapping[str, Any]]) -> str:
    heads = ("model", "rows of", "n", "accuracy", "ECE", "confidence - accuracy", "agreement")
    keys = ("accuracy", "ece", "overconfidence", "agreement")
    cells = [
        [r["model"], r["set"], f"{r['n']:,}", *(_number(r[key]) for key in keys)] for r in rows
    ]
    said = html.paragraph(
        "Agreement: share of rows for which the fine-tuned model predicts the same class. "
        "Movement: as many parameters as the graft asked for, those that moved most, without "
        "learning which matter.",
        "small soft",
    )
    return html.table(heads, cells, left=2) + said


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.4f}"


def reliability_picture(folder: Path, diagrams: Mapping[str, Mapping[str, Any]]) -> Picture:
    """A panel per model: accuracy within bins of confidence, and how many rows are in each.

    `diagrams`: model -> {'count', 'confidence', 'accuracy'}, lists over bins, None where empty.
    """
    names = list(diagrams)
    with style() as figure_class:
        figure = figure_class(figsize=(WIDTH, 2.75), layout="constrained")
        axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
        look = looks(names)
        for ax, name in zip(axes, names, strict=True):
            count = np.array(diagrams[name]["count"], dtype=float)
            accuracy = np.array(diagrams[name]["accuracy"], dtype=float)  # None becomes NaN
            confidence = np.array(diagrams[name]["confidence"], dtype=float)
            bins, total = len(count), max(1.0, count.sum())
            edges = np.arange(bins) / bins
            ax.bar(edges, count / total, 1 / bins, align="edge", color=SOFT, alpha=0.22, lw=0)
            ax.plot((0, 1), (0, 1), color=SOFT, lw=0.9, ls=(0, (4, 3)))
            full = count > 0
            ax.plot(
                confidence[full],
                accuracy[full],
                color=look[name].colour,
                marker=look[name].marker,
                ms=4.5,
                clip_on=False,
            )
            gap = np.nan_to_num(np.abs(accuracy - confidence))
            ax.set_title(short(name, 16))
            ax.text(0.04, 0.93, f"ECE {(count * gap).sum() / total:.3f}", fontsize=9, color=INK)
            ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence")
            ax.set_xticks((0, 0.5, 1), ("0", ".5", "1"))
            ax.set_aspect("equal")
        axes[0].set_ylabel("accuracy")
        caption = (
            "Accuracy of test rows against the probability of their top class; on the dashed line "
            "a model is as sure as it is right, below it too sure. Grey: share of rows in the bin."
        )
        return finish(figure, folder, "reliability", "Is it as sure as it is right?", caption)


def bits_picture(folder: Path, cells: Sequence[Mapping[str, Any]], count: int) -> Picture:
    """A map, layers x kinds of module: share of the graft's bits; numbers are bits.

    `cells`: rows of `bits_by_module` as mappings. Beyond 14 kinds the emptiest are summed up.
    """
    kinds = list(dict.fromkeys(c["module"] for c in cells))
    totals = {k: sum(c["bits"] for c in cells if c["module"] == k) for k in kinds}
    if len(kinds) > _SHOWN:
        kept = sorted(kinds, key=lambda k: -totals[k])[: _SHOWN - 1]
        kinds = [k for k in kinds if k in kept] + ["(others)"]
    layers = list(dict.fromkeys(c["layer"] for c in cells))
    grid = np.full((len(layers), len(kinds)), np.nan)
    for c in cells:
        kind = c["module"] if c["module"] in kinds else "(others)"
        at = layers.index(c["layer"]), kinds.index(kind)
        grid[at] = np.nan_to_num(grid[at]) + c["bits"]
    with style() as figure_class:
        height = 1.5 + 0.3 * len(layers)
        figure = figure_class(figsize=(WIDTH, height), layout="constrained")
        ax = figure.subplots()
        share = grid / max(1, count)
        image = ax.imshow(share, aspect="auto", cmap="Blues", vmin=0)
        for (i, j), value in np.ndenumerate(grid):
            if not np.isnan(value) and len(layers) <= 30:
                colour = ink_on(image.cmap(image.norm(share[i, j])))
                ax.text(j, i, f"{int(value):,}", ha="center", va="center", fontsize=8, color=colour)
        ax.set_xticks(range(len(kinds)), [short(k, 26) for k in kinds], rotation=35, ha="right")
        ax.set_yticks(range(len(layers)), ["-" if x is None else str(x) for x in layers])
        ax.set_ylabel("layer")
        ax.grid(False)
        bar = figure.colorbar(image, ax=ax, format=lambda x, _: f"{x:.0%}", pad=0.02)
        bar.outline.set_visible(False)  # type: ignore[operator]
        bar.set_label("share of the graft")
        caption = "Grafted parameters by layer and kind of module; a blank cell does not exist."
        return finish(figure, folder, "bits", "Where the skill lies", caption)


def trace_picture(folder: Path, trace: Sequence[Mapping[str, Any]]) -> Picture:
    """Score of the rounded mask, and bits added and removed, over the steps.

    `trace`: `MaskStep`s as mappings; step 0, the coordinates that moved most, is the dashed line.
    """
    from matplotlib.ticker import MaxNLocator

    steps = [t["step"] for t in trace[1:]]
    scores = np.array([t["score"] for t in trace], dtype=float)  # None becomes NaN
    best = int(np.nanargmax(scores))
    with style() as figure_class:
        figure = figure_class(figsize=(WIDTH, 3.4), layout="constrained")
        top, below = figure.subplots(2, 1, sharex=True)
        top.plot(steps, scores[1:], color=BRIGHT[0], marker="o", ms=3, label="learned mask")
        if not np.isnan(scores[0]):
            top.axhline(scores[0], color=SOFT, ls=(0, (4, 3)), lw=1.2, label="moved most")
        if best:
            top.plot(
                best, scores[best], "o", ms=9, mfc="none", mec=BRIGHT[1], mew=1.6, clip_on=False
            )
        top.margins(y=0.15)
        top.set_ylabel("validation score")
        top.legend(ncols=2, loc="upper left", bbox_to_anchor=(0, 1.28), borderaxespad=0)
        for key, label, colour, dash in (
            ("count", "bits", INK, "-"),
            ("added", "added to the base patch", BRIGHT[2], "-"),
            ("removed", "removed", BRIGHT[1], (0, (4, 1.5))),
        ):
            below.plot(steps, [t[key] for t in trace[1:]], color=colour, ls=dash, label=label)
        below.set(xlabel="step", ylabel="bits")
        below.set_ylim(bottom=0)
        below.xaxis.set_major_locator(MaxNLocator(integer=True))
        below.legend(ncols=3, loc="upper left", bbox_to_anchor=(0, 1.28), borderaxespad=0)
        kept = "The ring marks the mask that was kept."
        if not best:
            kept = "No learned mask was better, so the coordinates that moved most were kept."
        return finish(figure, folder, "mask", "How the mask was learned", kept)


def overlap_picture(
    folder: Path, names: Sequence[str], matrix: Sequence[Sequence[float]]
) -> Picture:
    """Heat map of O_ij = |i and j| / |j|."""
    grid = np.array(matrix, dtype=float)
    with style() as figure_class:
        side = min(WIDTH, 2.2 + 0.55 * len(names))
        figure = figure_class(figsize=(side + 0.8, side), layout="constrained")
        ax = figure.subplots()
        image = ax.imshow(grid, cmap="Blues", vmin=0, vmax=1)
        for (i, j), value in np.ndenumerate(grid):
            if not np.isnan(value) and len(names) <= 16:
                colour = ink_on(image.cmap(image.norm(value)))
                ax.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8.5, color=colour)
        shown = [short(name, 18) for name in names]
        ax.set_xticks(range(len(names)), shown, rotation=35, ha="right")
        ax.set_yticks(range(len(names)), shown)
        ax.set(xlabel="region of j", ylabel="also in region i")
        ax.grid(False)
        bar = figure.colorbar(image, ax=ax, pad=0.03, shrink=0.85)
        bar.outline.set_visible(False)  # type: ignore[operator]
        caption = "Share of region j that region i has too. Alike tasks overlap more."
        return finish(figure, folder, "overlap", "How regions overlap", caption)


def overlap_report(folder: Path, names: Sequence[str], matrix: Any, sizes: Sequence[str]) -> Path:
    """Write overlap.html with the heat map and the grafts' sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    picture = overlap_picture(folder, names, matrix)
    body = [
        html.paragraph("Skill localization", "kicker"),
        "<h1>Overlap of grafts</h1>",
        html.figure(picture),
        html.section("Grafts", html.items(sizes)),
    ]
    path = folder / "overlap.html"
    files.write_text(path, html.page("Overlap of grafts", body))
    return path
