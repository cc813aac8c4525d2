"""`polytask data`: list, show and fetch the real data sets found inside packages."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from polytask.data.embedded import EmbeddedInfo

app = typer.Typer(
    help="Real data sets and pretrained models that travel inside packages.",
    no_args_is_help=True,
    add_completion=False,
)
AS_JSON = typer.Option(False, "--json", help="Print JSON instead of a table.")


@app.command("list")
def list_sets(as_json: bool = AS_JSON) -> None:
    """Every embedded data set and packaged model: is it here, and how to get it."""
    from polytask.data import embedded

    found = [_summary(name) for name in (*embedded.names(), *embedded.weights_names())]
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("name", no_wrap=True)
    table.add_column("modality")
    table.add_column("task", no_wrap=True)
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("licence", overflow="ellipsis", no_wrap=True, max_width=13)
    table.add_column("here?", no_wrap=True)
    for row in found:
        here = "[green]yes[/green]" if row["here"] else "[yellow]fetch[/yellow]"
        rows = f"{row['rows']:,}" if row["rows"] else "-"
        licence = re.split(r"[;(]", row["licence"])[0].strip()
        task = row["schema"] or "-"
        table.add_row(row["name"], row["modality"], task, rows, _escaped(licence), here)
    Console().print(table)
    print(
        "\nyes: on this machine. fetch: 'polytask data fetch NAME' downloads it."
        "\n'polytask data show NAME' has the full licence, the traps, every way to get it"
        "\nand a task configuration to copy."
    )


@app.command("show")
def show_set(name: str, as_json: bool = AS_JSON) -> None:
    """What a data set is, where it comes from, and a task configuration that uses it."""
    from polytask.data import embedded

    info = embedded.info(name)
    facts = _facts(info)
    if as_json:
        print(json.dumps(facts, ensure_ascii=False))
        return
    import yaml
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(f"[bold]{_escaped(name)}[/bold]  {_escaped(info.title)}\n")
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    rows = ", ".join(f"{split} {count:,}" for split, count in facts["size"].items())
    shown = {
        "licence": info.licence,
        "modality": info.modality,
        "rows": rows,
        "classes": ", ".join(info.classes),
        "here": facts["state"] if facts["here"] else "no",
        "how to get it": "\n".join(facts["how"]),
        "checksum": facts["checksum"],
        "traps": info.note,
    }
    for heading, text in shown.items():
        if text:
            table.add_row(heading, _escaped(text))
    console.print(table)
    if info.tasks:
        tasks = yaml.safe_dump({"tasks": facts["tasks"]}, sort_keys=False, allow_unicode=True)
        console.print(f"\n[bold]as tasks of a configuration[/bold]\n{_escaped(tasks)}")


@app.command("fetch")
def fetch_set(name: str, as_json: bool = AS_JSON) -> None:
    """Download the package of a data set into the cache (nothing is installed)."""
    from polytask.data import embedded

    info = embedded.info(name)
    folder = embedded.fetch(name)
    if info.modality == "weights":
        rows: dict[str, int] = {}
        folder = embedded.weights(name)
    else:
        rows = {split: len(source) for split, source in embedded.load(name).items()}
    if as_json:
        print(json.dumps({"name": name, "folder": str(folder), "rows": rows}))
        return
    counts = ", ".join(f"{split} {count:,} rows" for split, count in rows.items())
    print(f"{name} is here: {folder}" + (f" ({counts})" if counts else ""))


def _summary(name: str) -> dict[str, Any]:
    from polytask.data import embedded

    info = embedded.info(name)
    state = embedded.state(name)
    return {
        "name": name,
        "title": info.title,
        "modality": info.modality,
        "schema": info.task.get("schema"),
        "rows": info.rows or None,
        "licence": info.licence,
        "here": state is not None,
        "state": state,
        "how": [line for source in info.sources for line in source.how(name)],
    }


def _facts(info: EmbeddedInfo) -> dict[str, Any]:
    return {
        **_summary(info.name),
        "size": dict(info.size),
        "classes": list(info.classes),
        "checksum": info.checksum,
        "fixed": info.fixed,
        "sources": [f"{source.kind} {source.requirement}" for source in info.sources],
        "tasks": {name: dict(task) for name, task in info.tasks.items()},
        "note": info.note,
    }


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
