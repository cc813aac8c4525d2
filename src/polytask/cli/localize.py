"""`polytask localize`: which few parameters carry what fine-tuning taught."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

app = typer.Typer(add_completion=False)


@app.command()
def localize(
    config: Path | None = typer.Argument(None, help="A YAML file; options override its keys."),
    base: str | None = typer.Option(None, help="The pretrained model: folder, hub id."),
    finetuned: str | None = typer.Option(None, help="The same model after fine-tuning."),
    data: str | None = typer.Option(None, help="Rows with text and label: a file, hub:ID."),
    valid: str | None = typer.Option(None, help="Rows to choose the mask by; else drawn."),
    test: str | None = typer.Option(None, help="Rows that judge; else drawn."),
    shifted: list[str] = typer.Option(
        [], metavar="NAME=FILE", help="More rows to judge on: other sources of the task."
    ),
    text: str | None = typer.Option(None, help="Column with the text."),
    label: str | None = typer.Option(None, help="Column with the label."),
    sparsity: float | None = typer.Option(None, help="Share of the parameters to keep (1e-4)."),
    steps: int | None = typer.Option(None, help="Steps of mask learning (20); 0: movement only."),
    lr: float | None = typer.Option(None, help="Step size; found from the gradient if omitted."),
    overrides: list[str] = typer.Option(
        [], "--set", metavar="KEY=VALUE", help="Any other key, as in --set mask.cap=5."
    ),
    out: Path = typer.Option(Path("runs/graft"), help="Folder for graft.safetensors and report."),
    as_json: bool = typer.Option(False, "--json", help="Print the outcome as JSON."),
) -> None:
    """Learn a tiny mask, keep the fine-tuned values under it, judge the graft.

    Writes graft.safetensors (coordinates and values), localize.json and report.html. A mask that
    was being learned when the command was interrupted is learned on.
    """
    from polytask.configs import load_yaml, parse
    from polytask.errors import ConfigError, NonFiniteError, UserError
    from polytask.pipeline.localize import localize as run
    from polytask.pipeline.localize_config import LocalizeConfig

    values = load_yaml(config) if config is not None else {}
    given = {
        "base": base,
        "finetuned": finetuned,
        "data": data,
        "valid": valid,
        "test": test,
        "text": text,
        "label": label,
        "sparsity": sparsity,
        "steps": steps,
        "lr": lr,
    }
    values |= {key: value for key, value in given.items() if value is not None}
    for item in shifted:
        name, equals, file = item.partition("=")
        if not equals or not name:
            raise ConfigError(f"--shifted takes NAME=FILE (given: '{item}')")
        values["shifted"] = {**values.get("shifted", {}), name: file}
    for item in overrides:
        _override(values, item)
    checked = parse(LocalizeConfig, values, str(config or "polytask localize"))
    home = config.parent if config is not None else Path()
    try:
        found = run(checked, out, home, None if as_json else typer.echo)
    except NonFiniteError as error:
        raise UserError(str(error)) from error
    if as_json:
        print(json.dumps(found.to_dict(), ensure_ascii=False))
        return
    _show(found)


def _override(values: dict[str, Any], item: str) -> None:
    """Put KEY.KEY=VALUE, the value as YAML, into nested mappings."""
    import yaml

    from polytask.errors import ConfigError

    key, equals, value = item.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set takes KEY=VALUE, for instance mask.cap=5 (given: '{item}')")
    *path, last = key.split(".")
    place = values
    for part in path:
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise ConfigError(f"--set {item}: '{part}' holds no keys")
    try:
        place[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {item}: the value is not valid YAML") from error


def _show(found: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for heading in ("model", "rows of"):
        table.add_column(heading)
    for heading in ("n", "accuracy", "ECE", "agreement"):
        table.add_column(heading, justify="right")
    for row in found.scores:
        numbers = (f"{row.accuracy:.4f}", f"{row.ece:.4f}", f"{row.agreement:.4f}")
        table.add_row(row.model, row.set, f"{row.n:,}", *numbers)
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print(str(found.graft))
    for note in found.notes:
        console.print(f"[dim]{note}[/dim]")
    console.print(f"wrote {found.folder / 'graft.safetensors'} and {found.folder / 'report.html'}")
