"""`polytask predict`: a task's answers for the rows of a file, written beside them."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import typer

app = typer.Typer(add_completion=False)

FORMATS = (".csv", ".tsv", ".jsonl", ".parquet")


@app.command()
def predict(
    run: Path = typer.Argument(help="A run folder, as `polytask train` leaves it."),
    file: str = typer.Argument(help="Rows: a file, a folder of images, hub:ID or embedded:NAME."),
    task: str = typer.Option(..., help="Which of the run's tasks to answer."),
    split: str | None = typer.Option(None, help="Which split, where the data has several."),
    out: Path | None = typer.Option(
        None, help="Write rows with their answers here (.csv, .tsv, .jsonl or .parquet)."
    ),
    batch_size: int = typer.Option(64, min=1, help="Rows per forward pass."),
    limit: int | None = typer.Option(None, min=1, help="Only the first rows."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object a row."),
) -> None:
    """Answer a task for the rows of a file, with a trained run."""
    from polytask.data import DataSpec, open_rows
    from polytask.data.rows import RowSource
    from polytask.errors import DataError
    from polytask.pipeline import load_run

    if out is not None and out.suffix not in FORMATS:
        raise DataError(f"--out {out}: choose one of {', '.join(FORMATS)}")
    found = load_run(run)
    found.processor.group_of(task)
    source = open_rows(DataSpec.of(file).model_copy(update={"split": split}), Path())
    rows = (
        source.take(range(len(source)))
        if isinstance(source, RowSource)
        else list(islice(source.read_from(0), limit))
    )
    rows = rows[:limit]
    answers = found.predictor(batch_size).predict(task, rows)
    if out is not None:
        _write(out, rows, answers)
        typer.echo(f"wrote {len(answers):,} rows to {out}", err=True)
    elif as_json:
        for answer in answers:
            print(json.dumps(answer, ensure_ascii=False))
    else:
        _show(rows, answers)


def _write(path: Path, rows: list[Any], answers: list[dict[str, Any]]) -> None:
    import pandas as pd

    from polytask import files

    plain = [
        {k: v for k, v in row.items() if isinstance(v, str | int | float | bool | type(None))}
        for row in rows
    ]
    frame = pd.DataFrame([row | answer for row, answer in zip(plain, answers, strict=True)])
    with files.writing(path) as aside:
        if path.suffix == ".parquet":
            frame.to_parquet(aside)
        elif path.suffix == ".jsonl":
            frame.to_json(aside, orient="records", lines=True, force_ascii=False)
        else:
            frame.to_csv(aside, index=False, sep="\t" if path.suffix == ".tsv" else ",")


def _show(rows: list[Any], answers: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_lines=False)
    table.add_column("row", justify="right")
    table.add_column("input", overflow="ellipsis", no_wrap=True, max_width=60)
    for key in answers[0] if answers else ():
        table.add_column(key)
    for number, (row, answer) in enumerate(zip(rows[:50], answers, strict=False), 1):
        first = next((str(v) for v in row.values() if isinstance(v, str)), "")
        table.add_row(str(number), first, *map(_brief, answer.values()))
    Console().print(table)
    if len(answers) > 50:
        typer.echo(f"... and {len(answers) - 50:,} more; use --out FILE or --json for all")


def _brief(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
