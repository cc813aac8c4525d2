"""The page of a study of architectures and objectives: a table of cells, and loss over tokens with
the speed-ups of adaptations marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polytask import files
from polytask.report import page as html
from polytask.report.drawing import INK, SOFT, WIDTH, Picture, finish, looks, style

_OBJECTIVES = {
    "flm": "full language modelling",
    "plm": "prefix language modelling",
    "mlm": "span corruption",
}


def arch_report(folder: Path, figures: Mapping[str, Any]) -> list[Path]:
    """Write report.html and loss-over-tokens.png into `folder`; returns their paths.

    figures: 'rows' (cell, parameters, tokens, 'held-out loss', 'of text alone'), 'curves' by name
    (a list over seeds of tokens, loss, text), 'speed-ups' by adaptation (scratch, factor, reached,
    loss, tokens), 'config'.
    """
    picture = curves_picture(folder, figures["curves"], figures["speed-ups"])
    rows = [
        [
            row["cell"],
            f"{row['parameters']:,}",
            f"{row['tokens']:,}",
            f"{row['held-out loss']:.3f}",
            f"{row['of text alone']:.3f}",
        ]
        for row in figures["rows"]
    ]
    heads = ["cell", "parameters", "tokens seen", "held-out loss", "of text alone"]
    note = (
        "Nats per target token. Losses of different objectives do not compare: sentinels are easy, "
        "and what is given differs. An encoder-decoder has about twice the parameters at about "
        "equal operations."
    )
    parts = [
        html.paragraph("Architecture and objective", "kicker"),
        "<h1>What to pretrain on this text</h1>",
        html.paragraph(_said(figures["speed-ups"]), "lead"),
        html.section("Loss over tokens seen", html.figure(picture)),
        html.section("Cells", html.table(heads, rows), html.paragraph(note)),
        html.section("How it was run", html.yaml_block(figures["config"])),
    ]
    path = folder / "report.html"
    files.write_text(path, html.page("Architecture and objective", parts))
    return [path, folder / "loss-over-tokens.png"]


def _said(gains: Mapping[str, Mapping[str, Any]]) -> str:
    if not gains:
        return "No adaptation was tried: it needs cd:flm and nd:mlm among the cells."
    told = []
    for name, gain in gains.items():
        least = "" if gain["reached"] else "at least "
        told.append(
            f"{name} by a switch of the mask reaches its loss {least}{gain['factor']:.1f} times as "
            f"fast as training {gain['scratch']} from scratch"
        )
    return "; ".join(told) + "."


def curves_picture(
    folder: Path,
    curves: Mapping[str, Sequence[Mapping[str, Sequence[float]]]],
    gains: Mapping[str, Mapping[str, Any]],
) -> Picture:
    """A panel per objective: held-out loss over tokens, means over seeds in bold."""
    names = list(curves)
    look = looks(names)
    panels = [o for o in _OBJECTIVES if any(_objective(name) == o for name in names)]
    with style() as figure_class:
        figure = figure_class(figsize=(WIDTH, 0.9 + 2.4 * len(panels)), layout="constrained")
        axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
        for ax, objective in zip(axes, panels, strict=True):
            shown = [name for name in names if _objective(name) == objective]
            for name in shown:
                _draw(ax, curves[name], look[name], name)
            for name in shown:
                if name in gains:
                    _mark(ax, gains[name], look[name].colour)
            ax.set_title(_OBJECTIVES[objective])
            ax.set_ylabel("held-out loss (nats)")
            _frame(ax, [curve for name in shown for curve in curves[name]])
            ax.legend(loc="upper right", ncols=2)
        axes[-1].set_xlabel("tokens seen (of an adaptation: since the mask was switched)")
        caption = (
            "Arrows run from where an adaptation ends to where training from scratch first has "
            "the same loss, or to its end if it never does."
        )
        return finish(figure, folder, "loss-over-tokens", "Loss over tokens seen", caption)


def _objective(name: str) -> str:
    return name.rpartition(":")[2]


def _draw(ax: Any, seeds: Sequence[Mapping[str, Sequence[float]]], look: Any, name: str) -> None:
    for curve in seeds:
        if len(seeds) > 1:
            ax.plot(curve["tokens"], curve["loss"], color=look.colour, lw=0.7, alpha=0.4)
    means = [sum(values) / len(seeds) for values in zip(*(c["loss"] for c in seeds), strict=True)]
    ax.plot(seeds[0]["tokens"], means, color=look.colour, ls=look.dash, label=name)


def _mark(ax: Any, gain: Mapping[str, Any], colour: str) -> None:
    """An arrow at the adaptation's last loss, with the factor above it."""
    start, loss = gain["tokens"], gain["loss"]
    stop = start * gain["factor"]
    arrow = {"arrowstyle": "->", "color": colour, "lw": 1.2}
    ax.annotate("", (stop, loss), (start, loss), arrowprops=arrow)
    least = "" if gain["reached"] else "≥ "
    ax.annotate(
        f"{least}{gain['factor']:.1f} x",
        ((start + stop) / 2, loss),
        xytext=(0, -11),
        textcoords="offset points",
        ha="center",
        color=INK,
    )
    ax.plot([start], [loss], "o", ms=4, color=colour)
    ax.plot([stop], [loss], "o", ms=4, mfc="none", color=SOFT)


def _frame(ax: Any, curves: Sequence[Mapping[str, Sequence[float]]]) -> None:
    """Leave out the fall of the first steps, in which everything looks alike."""
    low = min(min(curve["loss"]) for curve in curves)
    high = max(curve["loss"][min(2, len(curve["loss"]) - 1)] for curve in curves)
    room = max(0.05, 0.08 * (high - low))
    ax.set_ylim(low - 2 * room, high + room)
    ax.set_xlim(left=0)
