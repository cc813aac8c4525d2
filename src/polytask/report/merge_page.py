"""The page of a merge: what it is worth, who is in it where, and where the models disagree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from polytask import files
from polytask.report import merge_figures as draw
from polytask.report import page as html
from polytask.report.layout import Range
from polytask.report.words import interval, metric_name, number, signed, verdict


def merge_report(
    folder: Path,
    name: str,
    record: Mapping[str, Any],
    figures: Sequence[Mapping[str, Any]],
    compared: Mapping[str, Any] | None = None,
    traces: Mapping[str, Any] | None = None,
) -> Path:
    """Write report.html and its pictures into `folder`.

    Args:
        folder: to write to; it exists.
        name: of the merge.
        record: what merge.json holds.
        figures: a mapping per tensor, `merge.anatomy.TensorAnatomy` as a mapping.
        compared: columns, rows and scales of `pipeline.merging.Compared`.
        traces: curves of what was learned, by what they show and by series.
    """
    models = list(record["models"])
    coefficients = draw.coefficient_map(figures, models, folder)
    anatomy = [draw.size_lines(figures, models, folder), *draw.disagreement_maps(figures, folder)]
    scales = draw.scale_curves(compared, folder) if compared else None
    curves = draw.trace_curves(traces, folder) if traces else []
    no_base = "" if figures else "Without a base there are no task vectors to look at."
    parts = [
        html.paragraph("Merge", "kicker"),
        f"<h1>{escape(name)}</h1>",
        html.paragraph(_lead(record, compared), "lead"),
        html.section("What it is worth", _table(compared), html.figure(scales)),
        html.section("Who is in it", html.figure(coefficients), *map(html.figure, curves)),
        html.section(
            "Where the models disagree",
            *map(html.figure, anatomy),
            html.paragraph(
                "Figures come from a sample of each tensor: all of it up to 65,536 values, "
                "else 16 runs of 4,096.",
                "small soft",
            )
            if figures
            else html.paragraph(no_base, "soft"),
        ),
        html.section("Notes", html.items(record["notes"])),
        html.section(
            "Recipe",
            html.yaml_block(record["recipe"]),
            html.folded(
                "Parameters as resolved", html.yaml_block(record["parameters"] or {"none": True})
            ),
        ),
    ]
    path = folder / "report.html"
    files.write_text(path, html.page(f"Merge {name}", parts))
    return path


def _lead(record: Mapping[str, Any], compared: Mapping[str, Any] | None) -> str:
    count = len(record["models"])
    said = f"{count} models merged by {record['method'].replace('_', ' ')}"
    said += f", {record['tensors']:,} tensors."
    if not compared:
        return said
    gains = [verdict(_range(row["gain"])) for row in compared["rows"]]
    better, worse = gains.count("better"), gains.count("worse")
    rest = len(gains) - better - worse
    return (
        f"{said} Against each task's own model it is better on {better} of {len(gains)} tasks, "
        f"worse on {worse}, and within chance on {rest}."
    )


def _range(gain: Sequence[float] | None) -> Range | None:
    return None if gain is None else Range(*gain)


def _table(compared: Mapping[str, Any] | None) -> str:
    if not compared:
        return ""
    columns = compared["columns"]
    heads = ["task", "metric", *columns, "merge − own", "95 % interval", "rows"]
    rows = []
    for row in compared["rows"]:
        gain = _range(row["gain"])
        kind = verdict(gain)
        colour = kind if kind in ("better", "worse") else ""
        values = [number(row["values"][column]) for column in columns]
        rows.append(
            [
                row["task"],
                metric_name(row["metric"], row["higher_is_better"]),
                *values,
                (signed(gain.mean if gain else None), colour),
                interval(gain),
                f"{row['rows']:,}",
            ]
        )
    said = html.paragraph(
        "Every task is answered through the head of the model it belongs to; a column says whose "
        "weights lie beneath. 'own' is that model itself; intervals resample the rows.",
        "small soft",
    )
    return html.table(heads, rows, left=2) + said
