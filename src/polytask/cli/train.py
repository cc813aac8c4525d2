"""`polytask train`: one model on many tasks, then its scores beside one model per task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

app = typer.Typer(add_completion=False)

STARTER = Path(__file__).with_name("starter.yaml")


@app.command()
def train(
    config: Path | None = typer.Argument(
        None, help="A YAML configuration; the starter job when left out.", show_default=False
    ),
    init: Path | None = typer.Option(
        None, help="Write a commented configuration for the data files in this folder, and stop."
    ),
    out: Path = typer.Option(Path("runs"), help="Folder that holds run folders."),
    name: str | None = typer.Option(None, help="Name of the run folder instead of the config's."),
    overrides: list[str] = typer.Option(
        [], "--set", metavar="KEY=VALUE", help="Change one key, as in --set train.steps=100."
    ),
    fresh: bool = typer.Option(False, help="Discard an earlier run of this name and start over."),
    check: bool = typer.Option(False, help="Check configuration and data, then stop."),
    as_json: bool = typer.Option(False, "--json", help="Print the scores as JSON."),
) -> None:
    """Train one model on many tasks.

    Run again after an interruption and it goes on where it stopped.
    """
    if init is not None:
        _init(init)
        return
    from polytask.pipeline import load_config
    from polytask.pipeline.prepare import prepare
    from polytask.pipeline.training import train as train_run

    notes = _collect_notes()
    given = [*overrides, *([f"name={name}"] if name else [])]
    path = config or STARTER
    settings = load_config(path, given)
    base = Path() if config is None else path.parent
    say = (lambda text: None) if as_json else _say
    if check:
        prepared = prepare(settings, base, say)
        for note in notes:
            _say(f"note: {note}")
        _say(f"{path}: {len(prepared.taskset.tasks)} tasks, all checks passed")
        return
    run = train_run(settings, out / settings.name, base=base, fresh=fresh, say=say)
    if as_json:
        print(json.dumps(run.scores))
        return
    if notes:
        _say(f"\n{len(notes)} notes about the data (all are in the report); the first:")
        _say(f"  {notes[0].splitlines()[0]}")
    _show(run.scores)
    _say(f"\n[bold]Look at[/bold] {run.report}")
    example = next(iter(settings.tasks))
    _say(f"Use it:  polytask predict {run.folder} --task {example} FILE")


def _init(folder: Path) -> None:
    from polytask import files
    from polytask.data import propose
    from polytask.errors import ConfigError

    text = propose(folder)
    path = folder / "polytask.yaml"
    if path.exists():
        raise ConfigError(f"{path} exists already; rename or remove it first")
    files.write_text(path, text)
    _say(f"wrote {path}. Read it, then: polytask train {path}")


def _collect_notes() -> list[str]:
    """Warnings about data are gathered instead of scrolling by before the progress view."""
    import logging

    found: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    logger = logging.getLogger("polytask.tasks")
    logger.addHandler(Collect())
    logger.propagate = False
    return found


def _say(text: str) -> None:
    from rich.console import Console

    Console(highlight=False, soft_wrap=True).print(text)


def _show(scores: dict[str, Any]) -> None:
    """The table people came for: each task, one model for all against one model for it alone."""
    from rich.console import Console
    from rich.table import Table

    from polytask.report import score_rows

    table = Table(title="one model for all tasks, and one model per task on the same rows")
    for heading in ("task", "metric"):
        table.add_column(heading)
    for heading in ("all tasks", "alone", "gain", "95 % interval"):
        table.add_column(heading, justify="right")
    for row in score_rows(scores):
        colour = {"better": "green", "worse": "red"}.get(row.verdict, "")
        table.add_row(
            row.task,
            row.metric,
            row.multitask,
            row.single,
            f"[{colour}]{row.difference}[/{colour}]" if colour else row.difference,
            row.interval,
        )
    Console().print(table)
