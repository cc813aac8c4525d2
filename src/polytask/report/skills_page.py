"""The page of a mixture over skills: what was drawn when, what it did to each loss, and the graph.

Works on the folder of any run whose mixture followed validation losses: the shares and losses of
every round are events in its metrics. Writes mixture.csv, pictures and skills.html.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from polytask import files
from polytask.errors import ConfigError
from polytask.mixture import SkillGraph
from polytask.report import page as html
from polytask.report.drawing import WIDTH, Picture, finish, ink_on, looks, short, style

_SHOWN = 24  # skills in a picture; the table has all
Round = Mapping[str, Any]  # after: steps done, shares by group, losses by task


def skills_page(folder: Path) -> Path:
    """Write mixture.csv, skills.html and the pictures into a run folder; the page.

    `ConfigError` where the run has no round on record.
    """
    rounds = read_rounds(folder)
    graph = read_graph(folder)
    files.write_text(folder / "mixture.csv", mixture_table(rounds))
    pictures = [shares_picture(folder, rounds), losses_picture(folder, rounds)]
    if graph is not None:
        pictures.append(graph_picture(folder, graph))
    name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["config"]["name"]
    last = rounds[-1]
    heads = ["task", "first share", "largest", "last", "loss before", "loss at the end"]
    rows = []
    for skill in last["shares"]:
        shares = [float(r["shares"].get(skill, 0.0)) for r in rounds]
        losses = [r["losses"].get(skill) for r in rounds]
        told = ["-" if v is None else f"{v:.4f}" for v in (losses[0], losses[-1])]
        rows.append([skill, *(f"{s:.3f}" for s in (shares[0], max(shares), shares[-1])), *told])
    parts = [
        html.paragraph("Mixture over skills", "kicker"),
        f"<h1>{escape(str(name))}</h1>",
        html.paragraph(said(rounds, graph), "lead"),
        *(html.figure(picture) for picture in pictures),
        html.section("Every task", html.table(heads, rows, left=1)),
        html.paragraph(
            "Losses are means over validation rows, measured before a round; the last ones are "
            "from before the last round. mixture.csv has every round.",
            "small soft",
        ),
    ]
    path = folder / "skills.html"
    files.write_text(path, html.page(f"Skills of {name}", parts))
    return path


def read_rounds(folder: Path) -> list[Round]:
    """The rounds of a run, in order."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise ConfigError(f"{folder} has no metrics.jsonl: it is no run folder, or nothing ran yet")
    lines = path.read_text(encoding="utf-8").splitlines()
    rounds = [line for line in map(json.loads, lines) if line.get("event") == "mixture"]
    if not rounds:
        raise ConfigError(
            f"the run in {folder} has no mixture that followed validation losses (skillit, or a "
            "curriculum by losses)"
        )
    return rounds


def read_graph(folder: Path) -> SkillGraph | None:
    """The graph that a run learned or was given; None where it had none."""
    if (folder / "graph.json").is_file():
        return SkillGraph.load(folder / "graph.json")
    record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    given = record["config"]["mixture"].get("graph")
    return SkillGraph.from_dict(given) if isinstance(given, Mapping) else None


def mixture_table(rounds: Sequence[Round]) -> str:
    """CSV: a line per round with steps done, the share of every group, the loss of every task."""
    groups = list(rounds[0]["shares"])
    tasks = list(dict.fromkeys(name for r in rounds for name in r["losses"]))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["round", "after_steps", *(f"share {g}" for g in groups), *(f"loss {t}" for t in tasks)]
    )
    for number, r in enumerate(rounds, 1):
        shares = [f"{r['shares'][g]:.6f}" for g in groups]
        losses = [f"{r['losses'][t]:.6f}" if t in r["losses"] else "" for t in tasks]
        writer.writerow([number, r["after"], *shares, *losses])
    return out.getvalue()


def said(rounds: Sequence[Round], graph: SkillGraph | None) -> str:
    """What happened, in a sentence or two."""
    first, last = rounds[0]["shares"], rounds[-1]["shares"]
    moved = {name: last[name] - first[name] for name in last}
    up, down = max(moved, key=lambda n: moved[n]), min(moved, key=lambda n: moved[n])
    text = f"{len(rounds)} rounds over {len(last)} tasks."
    if moved[up] > 0.005:
        text += (
            f" From the first to the last, '{up}' went from {first[up]:.0%} to {last[up]:.0%} of "
            f"the mixture and '{down}' from {first[down]:.0%} to {last[down]:.0%}."
        )
    if graph is not None:
        others = ~graph.own
        edges = int(((graph.A > 0) & others).sum())
        text += f" The graph has {edges} of {int(others.sum())} possible edges between tasks."
    return text


def shares_picture(folder: Path, rounds: Sequence[Round]) -> Picture:
    """Stacked areas of the shares, a step per round."""
    names = _most(rounds)
    look = looks(names)
    steps = np.array([r["after"] for r in rounds], dtype=np.float64)
    width = steps[1] - steps[0] if len(steps) > 1 else 1.0
    edges = np.append(steps, steps[-1] + width)
    table = np.array([[r["shares"][n] for r in rounds] for n in names])
    table = np.append(table, table[:, -1:], axis=1)
    with style() as figure_class:
        figure = figure_class(figsize=(WIDTH, 3.2), layout="constrained")
        ax = figure.subplots()
        colours = [look[n].colour for n in names]
        labels = [short(n, 24) for n in names]
        ax.stackplot(edges, table, colors=colours, labels=labels, step="post", lw=0.4, ec="white")
        ax.set_xlim(edges[0], edges[-1])
        ax.set_ylim(0, max(1.0, float(table.sum(0).max())))
        ax.set_xlabel("steps")
        ax.set_ylabel("share of the mixture")
        handles, texts = ax.get_legend_handles_labels()
        ax.legend(handles[::-1], texts[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5))
        caption = "A step per round; all shares add up to one."
        return finish(figure, folder, "mixture-shares", "What was drawn when", caption)


def losses_picture(folder: Path, rounds: Sequence[Round]) -> Picture:
    """Validation loss of every task over training."""
    tasks = list(dict.fromkeys(name for r in rounds for name in r["losses"]))[:_SHOWN]
    look = looks(tasks)
    with style() as figure_class:
        figure = figure_class(figsize=(WIDTH, 3.0), layout="constrained")
        ax = figure.subplots()
        for name in tasks:
            found = [(r["after"], r["losses"][name]) for r in rounds if name in r["losses"]]
            x, y = zip(*found, strict=True)
            one = look[name]
            ax.plot(
                x, y, color=one.colour, ls=one.dash, marker=one.marker, ms=4, label=short(name, 24)
            )
        ax.set_ylim(bottom=0)
        ax.set_xlabel("steps")
        ax.set_ylabel("validation loss")
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        caption = "Means over validation rows, measured before each round."
        return finish(figure, folder, "skill-losses", "What it did to each loss", caption)


def graph_picture(folder: Path, graph: SkillGraph) -> Picture:
    """Heat map of A: training skills by evaluation skills."""
    rows, columns = graph.train_names[:_SHOWN], graph.eval_names[:_SHOWN]
    table = graph.A[:_SHOWN, :_SHOWN]
    top = max(1e-9, float(np.abs(table).max()))
    signed = bool((table < 0).any())
    with style() as figure_class:
        wide = min(WIDTH, 2.6 + 0.55 * len(columns))
        figure = figure_class(figsize=(wide, 1.6 + 0.4 * len(rows)), layout="constrained")
        ax = figure.subplots()
        image = ax.imshow(
            table,
            cmap="RdBu" if signed else "Blues",
            vmin=-top if signed else 0,
            vmax=top,
            aspect="auto",
        )
        ax.grid(False)
        ax.set_xticks(range(len(columns)), [short(c, 18) for c in columns], rotation=45, ha="right")
        ax.set_yticks(range(len(rows)), [short(r, 18) for r in rows])
        ax.set_ylabel("training on ...")
        ax.set_xlabel("... helps")
        if table.size <= 144:
            for i, j in np.ndindex(table.shape):
                colour = ink_on(image.to_rgba(table[i, j]))
                text = f"{table[i, j]:.2g}"
                ax.text(j, i, text, ha="center", va="center", color=colour, fontsize=7.5)
        bar = figure.colorbar(image, ax=ax, shrink=0.9)
        bar.set_label("weight of the edge")
        bar.outline.set_visible(False)
        caption = "Row: what is trained on. Column: whose loss it brings down."
        return finish(figure, folder, "skill-graph", "Which skill helps which", caption)


def _most(rounds: Sequence[Round]) -> list[str]:
    """The groups with the largest shares on the whole, in the order of the run."""
    names = [n for n in rounds[0]["shares"] if any(r["shares"][n] > 0 for r in rounds)]
    total = {n: sum(r["shares"][n] for r in rounds) for n in names}
    kept = sorted(names, key=lambda n: -total[n])[:_SHOWN]
    return [n for n in names if n in kept]
