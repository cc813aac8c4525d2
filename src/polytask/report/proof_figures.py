"""Pictures of a proof: every seed as a dot, pairs connected; differences with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polytask.evaluate.intervals import t_interval
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
    finish,
    short,
    style,
)
from polytask.report.words import plain_metric
from polytask.study.evidence import Evidence, Judgement

_COLOURS = {"shown": BETTER, "contradicted": WORSE, "not shown": SOFT, "not judged": SOFT}


def arms(
    evidence: Evidence,
    metric: str,
    names: Sequence[str],
    higher_is_better: bool,
    looks: Mapping[str, Look],
    folder: Path,
) -> Picture:
    """One metric: a row per arm, a dot per seed, a line through each seed's dots, the mean with
    its 95% interval below the dots."""
    with style() as figure_class:
        figure = figure_class(figsize=(WIDTH, 0.9 + 0.62 * len(names)))
        ax = figure.subplots()
        values = {name: evidence.arms[name].values(metric) for name in names}
        for k in range(len(evidence.seeds)):
            line = [(v, y) for y, name in enumerate(names) if (v := values[name][k]) is not None]
            ax.plot([x for x, _ in line], [y for _, y in line], color=GRID, lw=1.3, zorder=1)
        for y, name in enumerate(names):
            known = [v for v in values[name] if v is not None]
            if not known:
                ax.text(0.02, y, "no finite value", transform=ax.get_yaxis_transform(), color=SOFT)
                continue
            look = looks[name]
            ax.plot(
                known,
                [y] * len(known),
                look.marker,
                ms=7.5,
                color=look.colour,
                alpha=0.75,
                mec=PAPER,
                mew=0.8,
                ls="none",
                zorder=3,
            )
            mean = sum(known) / len(known)
            if len(known) >= 2:
                found = t_interval(known)
                ax.plot(
                    [found.low, found.high],
                    [y + 0.28] * 2,
                    color=look.colour,
                    lw=2.4,
                    solid_capstyle="round",
                    zorder=2,
                )
            ax.plot([mean], [y + 0.28], "|", ms=11, mew=2.6, color=INK, zorder=4)
        ax.set_yticks(range(len(names)), [short(name, 30) for name in names])
        ax.tick_params(axis="y", labelcolor=INK, labelsize=9.5)
        ax.set_ylim(len(names) - 0.4, -0.55)
        ax.spines["left"].set_visible(False)
        ax.grid(axis="y", visible=False)
        better = "right" if higher_is_better else "left"
        ax.set_xlabel(f"{plain_metric(metric)}   ({better} is better)")
        caption = (
            "Every dot is one seed; a grey line joins the runs that share it (same data, same "
            "initialisation). Below: the mean with its 95% interval over seeds, which includes "
            "what the arms share; what is judged are the paired differences above."
        )
        title = f"{plain_metric(metric)} of every arm and seed"
        return finish(figure, folder, f"arms-{_plain(metric)}", title, caption)


def differences(evidence: Evidence, folder: Path) -> Picture | None:
    """One panel per claim: the paired gain of every seed, the interval, the margin."""
    shown = [j for j in evidence.judgements if any(d is not None for d in j.differences)]
    if not shown:
        return None
    with style() as figure_class:
        height = 0.95 * len(shown) + 0.3
        figure = figure_class(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
        for ax, judgement in zip(axes, shown, strict=True):
            _panel(ax, judgement)
        caption = (
            "Gain of the arm that is claimed to be better, one dot per seed, with the interval "
            "that decides. Blue: shown; rust: contradicted; grey: open. Right of the dashed line "
            "lies what was claimed."
        )
        return finish(figure, folder, "differences", "Paired differences", caption)


def _panel(ax: Any, judgement: Judgement) -> None:
    claim = judgement.claim
    colour = _COLOURS[judgement.verdict]
    known = [d for d in judgement.differences if d is not None]
    ax.axvline(0, color=INK, lw=1)
    if claim.margin:
        ax.axvline(claim.margin, color=INK, lw=1.2, ls=(0, (4, 2)))
    ax.plot(known, [0] * len(known), "o", ms=7, color=colour, alpha=0.55, mec=PAPER, mew=0.8)
    interval = judgement.t if claim.interval == "t" else judgement.bootstrap
    if interval is not None:
        ax.plot(
            [interval.low, interval.high], [0.55] * 2, color=colour, lw=3, solid_capstyle="round"
        )
        ax.plot([interval.mean], [0.55], "D", ms=7.5, color=colour, mec=PAPER, mew=1)
    ax.set_ylim(1.05, -0.55)
    ax.set_yticks([])
    ax.grid(axis="y", visible=False)
    ax.spines["left"].set_visible(False)
    ax.margins(x=0.06)
    left, right = ax.get_xlim()
    ax.set_xlim(min(left, 0 - 0.04 * (right - left)), max(right, 0 + 0.04 * (right - left)))
    kind = "ablation, " if claim.kind == "ablation" else ""
    name = f"{short(claim.better, 26)} over {short(claim.than, 26)}: {plain_metric(claim.metric)}"
    ax.set_title(f"{name}  ({kind}{judgement.verdict})", fontsize=9.5, color=INK)


def _plain(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)
