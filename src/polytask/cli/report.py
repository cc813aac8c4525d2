"""`polytask report`: the HTML page of a run folder or of an evidence file."""

from __future__ import annotations

from pathlib import Path

import typer

app = typer.Typer(add_completion=False)


@app.command()
def report(
    path: Path = typer.Argument(help="A run folder, or evidence/NN-name.json."),
    out: Path | None = typer.Option(None, help="Folder to write to; beside the source if omitted."),
) -> None:
    """Write the HTML report of a run folder or of an evidence file, with its pictures."""
    from polytask.errors import DataError
    from polytask.report import proof_report, run_report

    if path.is_dir():
        page = run_report(path, out)
    elif path.suffix == ".json" and path.is_file():
        from polytask.study import load_evidence

        page = proof_report(load_evidence(path), out or path.parent)
    else:
        raise DataError(f"{path} is neither a run folder nor an evidence file")
    typer.echo(f"wrote {page}")
