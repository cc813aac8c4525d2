"""The page of an adapted run: what trains, which task takes which module, whether tasks agree."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from polytask import files
from polytask.report import page as html
from polytask.report.drawing import INK, WIDTH, Picture, diverging, finish, ink_on, short, style

_PANELS = 12  # routing tables in the picture; the file has all
_TASKS = 40


def adapt_report(folder: Path, record: Mapping[str, Any]) -> Path:
    """Write adapters.html and its pictures into `folder`.

    `record` is what adapters.json holds: method, tasks, sites, share, routing, sources, alignment.
    """
    pictures = pictures_of(folder, record)
    share = record["share"]
    rows = [[name, f"{count:,}"] for name, count in share["parts"].items()]
    rows.append(["all that trains", f"{share['trained']:,}"])
    parts = [
        html.paragraph("Adapters", "kicker"),
        f"<h1>{escape(str(record['name']))}</h1>",
        html.paragraph(escape(str(record["told"])), "lead"),
        *(html.figure(picture) for picture in pictures),
        html.section("What trains", html.table(["part", "numbers"], rows, left=1, total=True)),
        html.section("Adapted modules", html.items([str(site) for site in record["sites"]])),
    ]
    path = folder / "adapters.html"
    files.write_text(path, html.page(f"Adapters of {record['name']}", parts))
    return path


def pictures_of(folder: Path, record: Mapping[str, Any]) -> list[Picture]:
    """The pictures that the record has data for."""
    found = []
    routing = record["routing"]
    if routing is not None:
        found.append(routing_picture(folder, routing, record.get("sources") or ()))
        if len(routing["tasks"]) > 2:
            found.append(tree_picture(folder, routing))
    if record["alignment"] is not None:
        found.append(alignment_picture(folder, record["alignment"]))
    return found


def routing_picture(
    folder: Path, routing: Mapping[str, Any], sources: Sequence[str] = ()
) -> Picture:
    """A panel per routing table: tasks by modules (mean over blocks), as deviation from 1 / S."""
    names = list(routing["weight"])
    shown = _spread(names, _PANELS)
    tasks = [short(str(t), 18) for t in routing["tasks"]][:_TASKS]
    tables = [np.asarray(routing["weight"][n], float).mean(1)[:_TASKS] for n in shown]
    centre = [1 / t.shape[1] if not sources else 2 / t.shape[1] for t in tables]
    reach = max(1e-6, *(float(np.abs(t - c).max()) for t, c in zip(tables, centre)))
    columns = min(3, len(shown))
    lines = math.ceil(len(shown) / columns)
    with style() as figure_class:
        tall = 0.5 + 0.19 * len(tasks)
        figure = figure_class(figsize=(WIDTH, 0.6 + lines * (tall + 0.45)), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False)
        image = None
        for ax in axes.flat[len(shown) :]:
            ax.set_axis_off()
        for number, (name, table) in enumerate(zip(shown, tables, strict=True)):
            ax = axes.flat[number]
            image = ax.imshow(
                table - centre[number], cmap=diverging(), vmin=-reach, vmax=reach, aspect="auto"
            )
            ax.grid(False)
            ax.set_title(short(_site(name), 26), fontsize=8.5)
            ax.set_yticks(range(len(tasks)), tasks if number % columns == 0 else [], fontsize=8)
            labels = [short(s, 10) for s in sources] or [str(i) for i in range(table.shape[1])]
            rotated = 60 if sources else 0
            ax.set_xticks(range(table.shape[1]), labels, fontsize=7.5, rotation=rotated)
        figure.supxlabel("source adapter" if sources else "module of the inventory", fontsize=9)
        bar = figure.colorbar(image, ax=axes, shrink=0.7, pad=0.01)
        bar.set_label("weight minus an even share")
        bar.outline.set_visible(False)
        rest = len(names) - len(shown)
        more = f" {rest} more tables are in adapters.json." if rest else ""
        caption = (
            "Blue: the task takes more of the module than an even share, rust: less; mean over "
            f"blocks of features.{more}"
        )
        return finish(figure, folder, "routing", "Which task takes which module", caption)


def tree_picture(folder: Path, routing: Mapping[str, Any]) -> Picture:
    """Tasks that take alike stand together: average linkage over routing weights."""
    from scipy.cluster.hierarchy import dendrogram, linkage
    from scipy.spatial.distance import pdist

    tasks = [str(t) for t in routing["tasks"]]
    flat = np.concatenate(
        [np.asarray(w, float).reshape(len(tasks), -1) for w in routing["weight"].values()], 1
    )
    distance = pdist(flat) / math.sqrt(flat.shape[1])
    with style() as figure_class:
        figure = figure_class(figsize=(WIDTH, 0.8 + 0.24 * len(tasks)), layout="constrained")
        ax = figure.subplots()
        dendrogram(
            linkage(distance, "average"),
            orientation="left",
            labels=[short(t, 28) for t in tasks],
            ax=ax,
            color_threshold=0,
            above_threshold_color=INK,
            leaf_font_size=9,
        )
        ax.set_xlabel("root mean square difference of routing weights")
        ax.grid(False, axis="y")
        caption = "Tasks that join further to the right take more alike of the inventory."
        return finish(figure, folder, "task-tree", "Which tasks route alike", caption)


def alignment_picture(folder: Path, alignment: Mapping[str, Any]) -> Picture:
    """Cosines between the gradients of tasks with respect to the modules they share."""
    tasks = [short(str(t), 20) for t in alignment["tasks"]]
    cosine = np.array(
        [[np.nan if v is None else v for v in row] for row in alignment["cosine"]], float
    )
    np.fill_diagonal(cosine, np.nan)
    side = min(WIDTH, 2.2 + 0.38 * len(tasks))
    with style() as figure_class:
        figure = figure_class(figsize=(side + 0.8, side), layout="constrained")
        ax = figure.subplots()
        image = ax.imshow(cosine, cmap=diverging(), vmin=-1, vmax=1)
        ax.grid(False)
        ax.set_xticks(range(len(tasks)), tasks, rotation=60, ha="right")
        ax.set_yticks(range(len(tasks)), tasks)
        if len(tasks) <= 14:
            for i, j in np.ndindex(cosine.shape):
                if not np.isnan(cosine[i, j]):
                    colour = ink_on(image.to_rgba(cosine[i, j]))
                    ax.text(
                        j,
                        i,
                        f"{cosine[i, j]:.2f}",
                        ha="center",
                        va="center",
                        color=colour,
                        fontsize=7,
                    )
        bar = figure.colorbar(image, ax=ax, shrink=0.7)
        bar.set_label("cosine of gradients")
        bar.outline.set_visible(False)
        caption = (
            "Blue: an update that helps one task helps the other; rust: it hurts it. Gradients of "
            "the shared modules on one batch of training rows, at the end of training."
        )
        return finish(figure, folder, "alignment", "Do tasks' gradients agree?", caption)


def _spread(names: Sequence[str], most: int) -> list[str]:
    """At most `most` names, evenly over the depth of the model."""
    if len(names) <= most:
        return list(names)
    return [names[round(i * (len(names) - 1) / (most - 1))] for i in range(most)]


def _site(name: str) -> str:
    """A module's name without what all of them have."""
    for start in ("encoder.layer.", "encoder.", "model.layers.", "blocks."):
        if name.startswith(start):
            return name.removeprefix(start)
    return name
