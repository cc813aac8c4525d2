"""Pictures of a model of spiking neurons, from plain arrays: activity, behaviour, connections.

Connections are matrices [target, source]: row y, column p is what p does to y.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polytask.report.drawing import BRIGHT, INK, SOFT, WIDTH, Picture, finish, looks, short, style

Array = NDArray[Any]
Events = tuple[Array, Array]  # units, seconds
_DOTS = 6000  # dots of a scatter; more only make it black
_RASTER = 60  # units of a raster


@dataclass(frozen=True)
class Activity:
    """Spikes of a stretch of time: `true` and, by name, `generated` (units, seconds)."""

    n_units: int
    begin: float
    end: float
    true: Events
    generated: Mapping[str, Events]


@dataclass(frozen=True)
class Trace:
    """A decoded variable: `time` (W,) seconds, `truth` and `value` (W,); `said` is its score."""

    name: str
    time: Array
    truth: Array
    value: Array
    said: str = ""


@dataclass(frozen=True)
class Wiring:
    """Readouts by name, (N, N) [target, source]; `edges`, the truth, where it is known."""

    readouts: Mapping[str, Array]
    edges: Array | None = None
    scores: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # AUROC, transposed


@dataclass(frozen=True)
class Latent:
    """Vectors (W, E) of windows, and a value (W,) each that colours them."""

    vectors: Array
    colour: Array
    name: str


def hub_order(edges: Array) -> tuple[NDArray[np.int64], int]:
    """Units with outgoing edges first (most first), then followers by their hub; and how many
    hubs there are."""
    truth = np.asarray(edges) != 0
    out = truth.sum(axis=0)
    hubs = np.flatnonzero(out)[np.argsort(-out[np.flatnonzero(out)], kind="stable")]
    rest = np.setdiff1d(np.arange(len(truth)), hubs)
    led = truth[np.ix_(rest, hubs)]
    first = np.where(led.any(axis=1), led.argmax(axis=1), len(hubs))
    return np.concatenate([hubs, rest[np.argsort(first, kind="stable")]]), len(hubs)


def strength_order(readout: Array) -> NDArray[np.int64]:
    """Units by how strongly others are read as driven by them, strongest first."""
    values = np.nan_to_num(np.asarray(readout, float).copy())
    np.fill_diagonal(values, 0.0)
    return np.argsort(-np.abs(values).sum(axis=0), kind="stable")


def raster_picture(folder: Path, found: Activity) -> Picture:
    """True spikes above, generated ones below, on the same time axis."""
    shown = np.arange(min(found.n_units, _RASTER))
    panels = {"recorded": found.true, **found.generated}
    each = min(2.6, 0.5 + 0.05 * len(shown))
    with style() as figure_class:
        high = 0.5 + each * len(panels)
        figure = figure_class(figsize=(WIDTH, high), layout="constrained")
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for ax, (name, (unit, time)) in zip(axes, panels.items(), strict=True):
            unit, time = np.asarray(unit), np.asarray(time, float)
            inside = (unit < len(shown)) & (time >= found.begin) & (time < found.end)
            colour = INK if name == "recorded" else looks([name])[name].colour
            trains = [time[inside & (unit == u)] for u in shown]
            ax.eventplot(trains, colors=colour, linelengths=0.8, linewidths=0.9)
            ax.set_title(f"{short(name, 40)}: {int(inside.sum()):,} spikes", fontsize=9.5)
            ax.set_ylabel("neuron")
            ax.set_ylim(len(shown) - 0.4, -0.6)
            ax.grid(False)
        axes[-1].set_xlim(found.begin, found.end)
        axes[-1].set_xlabel("seconds")
        more = found.n_units - len(shown)
        caption = "One tick is one spike, one row one neuron."
        caption += f" {more} more neurons are not drawn." if more else ""
        return finish(figure, folder, "raster", "Recorded and generated spikes", caption)


def psth_picture(folder: Path, true: Array, generated: Mapping[str, Array]) -> Picture:
    """Rates per neuron and time bin, generated against true.

    `true`, and each of `generated`: (N, T) spikes per second.
    """
    real = np.asarray(true, float)
    names = list(generated)
    with style() as figure_class:
        figure = figure_class(figsize=(WIDTH, 3.4), layout="constrained")
        axes = figure.subplots(1, max(2, len(names)), squeeze=False)[0]
        for ax in axes[len(names) :]:
            ax.set_axis_off()
        look = looks(names)
        for ax, name in zip(axes, names):
            made = np.asarray(generated[name], float)
            pick = np.linspace(0, real.size - 1, min(real.size, _DOTS)).astype(int)
            colour = look[name].colour
            ax.scatter(real.ravel()[pick], made.ravel()[pick], s=5, color=colour, alpha=0.15, lw=0)
            ax.scatter(real.mean(1), made.mean(1), s=22, color=colour, edgecolor=INK, lw=0.6)
            top = float(max(real.max(initial=0), made.max(initial=0), 1e-9)) * 1.05
            ax.plot((0, top), (0, top), color=SOFT, lw=0.9, ls=(0, (4, 3)))
            r = _r(real.mean(1), made.mean(1)), _r(real, made)
            ax.set_title(short(name, 30), fontsize=9.5)
            said = f"r = {r[0]:.2f} of means, {r[1]:.2f} of bins"
            ax.text(0.03, 0.96, said, transform=ax.transAxes, va="top", fontsize=8.5, color=SOFT)
            ax.set_xlabel("recorded, spikes/s")
            ax.set_ylabel("generated, spikes/s")
        caption = "Large dots are neurons, small ones a neuron in one time bin."
        return finish(figure, folder, "psth", "Rates: generated against recorded", caption)


def _r(a: Array, b: Array) -> float:
    x, y = a.ravel() - a.mean(), b.ravel() - b.mean()
    under = math.sqrt(float((x * x).sum() * (y * y).sum()))
    return float((x * y).sum()) / under if under else float("nan")


def trace_picture(folder: Path, found: Trace, most: int = 1200) -> Picture:
    """A variable as it was and as it was decoded, over held-out time."""
    part = slice(0, most)
    time = np.asarray(found.time, float)[part]
    with style() as figure_class:
        figure = figure_class(figsize=(WIDTH, 2.5), layout="constrained")
        ax = figure.subplots()
        look = looks(["decoded"])["decoded"]
        gaps = np.zeros(0, np.int64)  # where the line is broken: windows that were left out
        if len(time) > 2:
            gaps = np.flatnonzero(np.diff(time) > 3 * np.median(np.diff(time))) + 1
        for name, values, colour in (
            ("decoded", found.value, look.colour),
            ("recorded", found.truth, INK),
        ):
            line = np.insert(np.asarray(values, float)[part], gaps, np.nan)
            when = np.insert(time, gaps, np.nan)
            width = 0.8 if name == "decoded" else 1.4
            ax.plot(when, line, color=colour, lw=width, label=name)
        ax.set_xlabel("seconds")
        ax.set_ylabel(short(found.name, 24))
        ax.legend(loc="upper right", ncols=2)
        caption = f"Held-out windows. {found.said}".strip()
        if len(found.time) > most:
            caption += f" The first {most:,} of {len(found.time):,} are drawn."
        plain = "".join(c if c.isalnum() else "-" for c in found.name)
        return finish(figure, folder, f"trace-{plain}", f"'{found.name}' from spikes", caption)


def wiring_picture(folder: Path, found: Wiring) -> Picture:
    """Heat maps, target by source, hubs first; the truth beside them where it is known."""
    order, hubs = (strength_order(next(iter(found.readouts.values()))), 0)
    panels: dict[str, Array] = dict(found.readouts)
    if found.edges is not None:
        order, hubs = hub_order(found.edges)
        panels = {"truth": np.asarray(found.edges, float), **panels}
    columns = 3 if len(panels) in (3, 5, 6) else min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    with style() as figure_class:
        side = WIDTH / max(2, columns)
        figure = figure_class(figsize=(side * columns, 0.3 + side * lines), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False).ravel()
        for ax in axes[len(panels) :]:
            ax.set_axis_off()
        for ax, (name, matrix) in zip(axes, panels.items()):
            values = np.array(matrix, float)[np.ix_(order, order)]
            np.fill_diagonal(values, np.nan)
            known = values[np.isfinite(values)]
            signed = bool(known.size) and float(known.min()) < 0
            top = float(np.quantile(np.abs(known), 0.995)) if known.size else 1.0
            low = -top if signed else float(np.quantile(known, 0.02)) if known.size else 0.0
            if name == "truth":
                low, top = (-np.abs(known).max() if signed else 0.0), float(np.abs(known).max())
            ax.imshow(values, cmap="PuOr_r" if signed else "Blues", vmin=low, vmax=top or 1.0,
                      interpolation="nearest")  # fmt: skip
            ax.grid(False)
            if hubs:
                ax.axvline(hubs - 0.5, color=BRIGHT[1], lw=1.0)
                ax.axhline(hubs - 0.5, color=BRIGHT[1], lw=1.0)
            said = ""
            if name in found.scores:
                forward, turned = found.scores[name]
                said = f"\n{forward:.2f}, transposed {turned:.2f}"
            ax.set_title(f"{short(name, 22)}{said}", fontsize=9.5)
            ax.set_xticks([])
            ax.set_yticks([])
            ax.set_xlabel("from")
            ax.set_ylabel("to")
        caption = "Row: the neuron that is driven; column: the one that drives."
        if hubs:
            caption += f" The {hubs} neurons that drive others stand first (red lines), then those "
            caption += "they drive, in their order. Numbers: AUROC for true edges."
        else:
            caption += " Ordered by outgoing strength. A hypothesis read off the model."
        return finish(figure, folder, "connectivity", "Who drives whom", caption)


def latent_picture(folder: Path, found: Latent) -> Picture:
    """The two largest principal components of the windows' vectors."""
    vectors = np.asarray(found.vectors, float)
    centred = vectors - vectors.mean(axis=0)
    _, size, axes_ = np.linalg.svd(centred, full_matrices=False)
    plane = centred @ axes_[:2].T
    if plane.shape[1] < 2:
        plane = np.pad(plane, ((0, 0), (0, 2 - plane.shape[1])))
    share = (size[:2] ** 2).sum() / max(float((size**2).sum()), 1e-30)
    pick = np.linspace(0, len(plane) - 1, min(len(plane), _DOTS)).astype(int)
    with style() as figure_class:
        figure = figure_class(figsize=(WIDTH * 0.72, 3.6), layout="constrained")
        ax = figure.subplots()
        dots = ax.scatter(*plane[pick].T, c=np.asarray(found.colour, float)[pick], s=9, lw=0,
                          cmap="viridis", alpha=0.8)  # fmt: skip
        bar = figure.colorbar(dots, ax=ax, shrink=0.85)
        bar.set_label(short(found.name, 24))
        bar.outline.set_visible(False)
        ax.set_xlabel("first component")
        ax.set_ylabel("second component")
        caption = f"A dot is a window; the two components hold {share:.0%} of the variance."
        return finish(figure, folder, "latent", "Windows in the model's space", caption)


def loss_picture(folder: Path, terms: Mapping[str, Sequence[tuple[float, float]]]) -> Picture:
    """A panel per loss term over steps; `terms`: 'train id' -> [(step, value)].

    The first word of a name is the curve ('train', 'validation'), the rest the term.
    """
    groups: dict[str, dict[str, Sequence[tuple[float, float]]]] = {}
    for name, line in terms.items():
        curve, _, term = name.partition(" ")
        groups.setdefault(term or "loss", {})[curve] = line
    columns = min(3, len(groups))
    lines = math.ceil(len(groups) / columns)
    look = looks(sorted({c for curves in groups.values() for c in curves}))
    with style() as figure_class:
        figure = figure_class(figsize=(WIDTH, 0.2 + 2.1 * lines), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False).ravel()
        for ax in axes[len(groups) :]:
            ax.set_axis_off()
        for ax, (term, curves) in zip(axes, groups.items()):
            for curve, line in curves.items():
                steps, values = np.array(line, float).reshape(-1, 2).T
                style_ = look[curve]
                ax.plot(steps, values, color=style_.colour, lw=1.3, label=curve)
            ax.set_title(short(term, 24), fontsize=9.5)
            ax.set_xlabel("step")
        axes[0].legend(loc="upper right")
        caption = "Identity and time of the next spike in nats per token; a variable in its "
        caption += "squared standard deviations (classes: nats)."
        return finish(figure, folder, "loss", "Loss per term", caption)


def attribution_picture(folder: Path, share: Array) -> Picture:
    """(T, H, W) how much pixels of the frames before a window mattered to its spikes."""
    values = np.asarray(share, float)
    with style() as figure_class:
        figure = figure_class(figsize=(WIDTH, 2.4), layout="constrained")
        axes = figure.subplots(1, len(values), squeeze=False)[0]
        top = float(values.max(initial=0)) or 1.0
        for k, (ax, frame) in enumerate(zip(axes, values, strict=True)):
            ax.imshow(frame, cmap="magma", vmin=0, vmax=top)
            ax.set_axis_off()
            ax.set_title(f"frame {k - len(values)}", fontsize=9)
        caption = "Gradient times attention, averaged over held-out windows; the last frame is the "
        caption += "latest."
        return finish(figure, folder, "attribution", "Which pixels mattered", caption)
