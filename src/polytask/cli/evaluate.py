"""`polytask evaluate`: score a finished run again, on its own test rows or on a file."""

from __future__ import annotations

import json
from pathlib import Path

import typer

app = typer.Typer(add_completion=False)


@app.command()
def evaluate(
    run: Path = typer.Argument(help="A run folder, as `polytask train` leaves it."),
    data: str | None = typer.Option(
        None, help="Labelled rows of one task (a file, hub:ID or embedded:NAME); needs --task."
    ),
    task: list[str] = typer.Option([], help="Only these tasks."),
    split: str = typer.Option("test", help="Which split of the run's own data."),
    batch_size: int = typer.Option(256, min=1, help="Rows per forward pass."),
    resume: bool = typer.Option(True, help="Go on after an interruption instead of starting over."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of a table."),
) -> None:
    """Score a run's tasks. Checksums of the model are verified first."""
    from polytask.errors import ConfigError
    from polytask.pipeline import load_run

    found = load_run(run)
    if data is not None and len(task) != 1:
        raise ConfigError("--data holds rows of one task: name it with --task")
    parts = run / f"evaluate-{split}.jsonl" if resume and data is None else None
    scores = found.evaluate(
        data, tasks=task or None, split=split, batch_size=batch_size, resume_file=parts
    )
    if as_json:
        print(json.dumps({n: {"rows": s.n, "metrics": s.metrics} for n, s in scores.items()}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for heading in ("task", "metric"):
        table.add_column(heading)
    for heading in ("score", "rows"):
        table.add_column(heading, justify="right")
    for name, score in scores.items():
        for metric, value in score.metrics.items():
            mark = " *" if metric == score.primary else ""
            table.add_row(name, metric + mark, f"{value:.4g}", f"{score.n:,}")
            name = ""
    Console().print(table)
