"""The page of a run with experts: which task uses which expert, what a request costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from polytask import files
from polytask.report import page as html
from polytask.report.drawing import INK, SOFT, WIDTH, Picture, finish, ink_on, looks, short, style

_LAYERS = 6  # layers in a picture; the file has all
_TASKS = 40


def experts_report(folder: Path, record: Mapping[str, Any]) -> Path:
    """Write experts.html and its pictures into `folder`.

    `record` is what experts.json holds: name, router, k, usage (`ExpertUsage.to_dict`), requests
    (flops, bytes, all_bytes per task).
    """
    pictures = pictures_of(folder, record)
    usage = record["usage"]
    rows = []
    for t, task in enumerate(usage["tasks"]):
        request = record["requests"][task]
        entropy = [f"{layer['entropy'][t]:.2f}" for layer in usage["layers"]]
        shown = [f"{request['flops'] / 1e6:,.2f}", f"{request['bytes'] / 1e6:,.2f}"]
        rows.append([str(task), *shown, *entropy])
    heads = ["task", "million operations", "MB touched"]
    heads += [f"entropy, block {layer['block']}" for layer in usage["layers"]]
    parts = [
        html.paragraph("Experts", "kicker"),
        f"<h1>{escape(str(record['name']))}</h1>",
        html.paragraph(verdict(record), "lead"),
        *(html.figure(picture) for picture in pictures),
        html.section("A request of each task", html.table(heads, rows, left=1)),
        html.paragraph(
            "Entropy of a task's use of experts, in nats: "
            f"{math.log(usage['experts']):.2f} when all are used evenly, "
            f"{math.log(record['k']):.2f} when every token goes to the same {record['k']}. "
            "Operations are those of one row, bytes those of the weights its task touches.",
            "small soft",
        ),
    ]
    path = folder / "experts.html"
    files.write_text(path, html.page(f"Experts of {record['name']}", parts))
    return path


def verdict(record: Mapping[str, Any]) -> str:
    """A sentence on how far apart tasks are routed, and one on a collapsed router."""
    usage = record["usage"]
    overlap = np.asarray(usage["overlap"], float)
    tasks = len(overlap)
    said = f"{tasks} task over {usage['experts']} experts per layer."
    if tasks > 1:
        mean = float((overlap.sum() - np.trace(overlap)) / (tasks * (tasks - 1)))
        said = f"Two tasks share {mean:.0%} of their use of experts, on average."
    floor = math.log(max(1, record["k"])) + 0.05
    fallen = [
        f"'{task}' in block {layer['block']}"
        for layer in usage["layers"]
        for task, entropy, tokens in zip(
            usage["tasks"], layer["entropy"], usage["tokens"], strict=True
        )
        if tokens and entropy < floor and usage["experts"] > record["k"]
    ]
    if fallen:
        said += f" Collapsed onto {record['k']} experts: {', '.join(fallen[:4])}."
    dropped = sum(layer["overflow"] for layer in usage["layers"])
    if dropped:
        said += f" {dropped:,} pairs of token and expert found no room."
    return said


def pictures_of(folder: Path, record: Mapping[str, Any]) -> list[Picture]:
    """Use per layer, overlap of tasks, cost of requests."""
    usage = record["usage"]
    found = [usage_picture(folder, usage)]
    if len(usage["tasks"]) > 1:
        found.append(overlap_picture(folder, usage))
    found.append(cost_picture(folder, record["requests"]))
    return found


def usage_picture(folder: Path, usage: Mapping[str, Any]) -> Picture:
    """A panel per layer: tasks by experts, share of the task's (token, expert) pairs."""
    layers = _spread(usage["layers"], _LAYERS)
    tasks = [short(str(t), 18) for t in usage["tasks"]][:_TASKS]
    tables = [np.asarray(layer["share"], float)[:_TASKS] for layer in layers]
    top = max(1e-9, *(float(t.max()) for t in tables))
    columns = min(2, len(layers))
    lines = math.ceil(len(layers) / columns)
    with style() as figure_class:
        high = 0.62 + lines * (0.62 + 0.26 * len(tasks))
        figure = figure_class(figsize=(WIDTH, high), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False)
        image = None
        for ax in axes.flat[len(layers) :]:
            ax.set_axis_off()
        for number, (layer, table) in enumerate(zip(layers, tables, strict=True)):
            ax = axes.flat[number]
            image = ax.imshow(table, cmap="Blues", vmin=0, vmax=top, aspect="auto")
            ax.grid(False)
            ax.set_title(f"block {layer['block']}", fontsize=9.5)
            ax.set_yticks(range(len(tasks)), tasks if number % columns == 0 else [], fontsize=8.5)
            ticks = range(0, table.shape[1], max(1, table.shape[1] // 16))
            ax.set_xticks(ticks, [str(i) for i in ticks], fontsize=8)
            if table.size <= 96:
                for i, j in np.ndindex(table.shape):
                    colour = ink_on(image.to_rgba(table[i, j]))
                    text = f"{100 * table[i, j]:.0f}"
                    ax.text(j, i, text, ha="center", va="center", color=colour, fontsize=7)
        figure.supxlabel("expert", fontsize=9)
        bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.01)
        bar.set_label("share of the task's use")
        bar.outline.set_visible(False)
        rest = len(usage["layers"]) - len(layers)
        more = f" {rest} more layers are in experts.json." if rest else ""
        caption = f"Numbers are per cent; a row adds up to 100.{more}"
        return finish(figure, folder, "expert-use", "Which task uses which expert", caption)


def overlap_picture(folder: Path, usage: Mapping[str, Any]) -> Picture:
    """Tasks by tasks: what share of their use of experts is the same."""
    tasks = [short(str(t), 20) for t in usage["tasks"]][:_TASKS]
    table = np.asarray(usage["overlap"], float)[:_TASKS, :_TASKS]
    side = min(WIDTH - 1, 2.0 + 0.4 * len(tasks))
    with style() as figure_class:
        figure = figure_class(figsize=(side + 1, side), layout="constrained")
        ax = figure.subplots()
        image = ax.imshow(table, cmap="Blues", vmin=0, vmax=1)
        ax.grid(False)
        ax.set_xticks(range(len(tasks)), tasks, rotation=60, ha="right")
        ax.set_yticks(range(len(tasks)), tasks)
        if len(tasks) <= 14:
            for i, j in np.ndindex(table.shape):
                colour = ink_on(image.to_rgba(table[i, j]))
                text = f"{table[i, j]:.2f}"
                ax.text(j, i, text, ha="center", va="center", color=colour, fontsize=7.5)
        bar = figure.colorbar(image, ax=ax, shrink=0.75)
        bar.set_label("overlap of use")
        bar.outline.set_visible(False)
        caption = (
            "1: two tasks use the experts in the same proportions; 0: they share none. Mean over "
            "layers of the sum over experts of the smaller share."
        )
        return finish(figure, folder, "expert-overlap", "Which tasks are routed alike", caption)


def cost_picture(folder: Path, requests: Mapping[str, Mapping[str, float]]) -> Picture:
    """Operations of a request, and bytes of weights it touches, beside the whole model's."""
    tasks = list(requests)[:_TASKS]
    look = looks(["operations", "bytes"])
    with style() as figure_class:
        high = 0.9 + 0.3 * len(tasks)
        figure = figure_class(figsize=(WIDTH, high), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        place = np.arange(len(tasks))
        work = [requests[t]["flops"] / 1e6 for t in tasks]
        touched = [requests[t]["bytes"] / 1e6 for t in tasks]
        whole = max(requests[t]["all_bytes"] / 1e6 for t in tasks)
        left.barh(place, work, 0.62, color=look["operations"].colour)
        right.barh(place, touched, 0.62, color=look["bytes"].colour)
        right.axvline(whole, color=INK, lw=1.2, ls=(0, (4, 1.5)))
        right.text(whole, -0.75, "whole model ", ha="right", va="center", fontsize=8, color=SOFT)
        left.set_yticks(place, [short(str(t), 20) for t in tasks])
        left.set_ylim(len(tasks) - 0.4, -1.1)
        left.set_xlabel("million operations per request")
        right.set_xlabel("MB of weights touched")
        for ax in (left, right):
            ax.grid(False, axis="y")
        caption = "One row answered for one task: its own gate, head, dense blocks and experts."
        return finish(figure, folder, "request-cost", "What a request costs", caption)


def _spread(layers: Sequence[Any], most: int) -> list[Any]:
    """At most `most` layers, evenly over the depth."""
    if len(layers) <= most:
        return list(layers)
    return [layers[round(i * (len(layers) - 1) / (most - 1))] for i in range(most)]
