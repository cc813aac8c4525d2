"""The page of a Neuroformer: how well it draws spikes, decodes behaviour, finds connections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from polytask import files
from polytask.report import page as html
from polytask.report.drawing import Picture
from polytask.report.neuro_figures import (
    Activity,
    Array,
    Latent,
    Trace,
    Wiring,
    attribution_picture,
    latent_picture,
    loss_picture,
    psth_picture,
    raster_picture,
    trace_picture,
    wiring_picture,
)
from polytask.report.words import number


@dataclass(frozen=True)
class NeuroRecord:
    """Everything the page shows; what is None or empty is left out.

    Attributes:
        name: of the recording. lead: a sentence or two of what came out.
        facts: words about the recording ('neurons' -> '30').
        scores: section ('Generated spikes') -> rows (what, value).
        activity: spikes to draw. psth: (true (N, T), {name: generated (N, T)}) spikes/s.
        traces: decoded variables. wiring: readouts. latent: vectors of windows.
        losses: 'train id' -> [(step, value)]. attribution: (T, H, W).
        notes: sentences that qualify the above.
    """

    name: str
    lead: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    scores: Mapping[str, Sequence[tuple[str, float | None]]] = field(default_factory=dict)
    activity: Activity | None = None
    psth: tuple[Array, Mapping[str, Array]] | None = None
    traces: Sequence[Trace] = ()
    wiring: Wiring | None = None
    latent: Latent | None = None
    losses: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    attribution: Array | None = None
    notes: Sequence[str] = ()


def neuro_report(folder: Path, record: NeuroRecord) -> Path:
    """Write report.html and its pictures into `folder`; returns the page."""
    pictures = neuro_pictures(folder, record)
    facts = [[name, text] for name, text in record.facts.items()]
    body = [
        html.paragraph("Neuroformer", "kicker"),
        f"<h1>{escape(record.name)}</h1>",
        html.paragraph(record.lead, "lead") if record.lead else "",
        html.section("The recording", html.table(["", ""], facts, left=2)) if facts else "",
        *(_scores(name, rows) for name, rows in record.scores.items()),
        *(html.section(p.title, html.figure(p)) for p in pictures),
        html.section("Notes", html.items(record.notes)) if record.notes else "",
    ]
    path = folder / "report.html"
    files.write_text(path, html.page(f"Neuroformer on {record.name}", body))
    return path


def neuro_pictures(folder: Path, record: NeuroRecord) -> list[Picture]:
    """The pictures that the record has data for, in the page's order."""
    found: list[Picture] = []
    if record.activity is not None:
        found.append(raster_picture(folder, record.activity))
    if record.psth is not None:
        found.append(psth_picture(folder, *record.psth))
    found += [trace_picture(folder, trace) for trace in record.traces]
    if record.wiring is not None:
        found.append(wiring_picture(folder, record.wiring))
    if record.latent is not None:
        found.append(latent_picture(folder, record.latent))
    if record.attribution is not None:
        found.append(attribution_picture(folder, record.attribution))
    if record.losses:
        found.append(loss_picture(folder, record.losses))
    return found


def _scores(title: str, rows: Sequence[tuple[str, float | None]]) -> str:
    cells: list[list[Any]] = [[what, number(value)] for what, value in rows]
    return html.section(title, html.table(["", "value"], cells, left=1))
