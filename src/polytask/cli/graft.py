"""`polytask graft`: apply, unite, purge and compare the grafts that `polytask localize` cuts."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from polytask.merge.graft_delta import SparseDelta
    from polytask.pipeline.graft_files import Written

app = typer.Typer(add_completion=False, no_args_is_help=True)


class Conflict(StrEnum):
    first = "first"
    last = "last"
    mean = "mean"
    sum = "sum"


@app.command()
def apply(
    graft: Path = typer.Argument(help="graft.safetensors, as `polytask localize` writes it."),
    base: str = typer.Option(help="The base: a Hugging Face folder, hub id or safetensors file."),
    out: Path = typer.Option(help="Where the grafted model goes; a folder, or a file for a file."),
    force: bool = typer.Option(False, help="Apply it to another base than it was cut from."),
    overwrite: bool = typer.Option(False, help="Replace what is at --out."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Write the base with the graft's values put in."""
    from polytask.pipeline.graft_files import apply_graft

    _tell(apply_graft(base, _load(graft), out, check=not force, overwrite=overwrite), as_json)


@app.command()
def union(
    grafts: list[Path] = typer.Argument(help="Grafts of one base, in the order of their claims."),
    out: Path = typer.Option(help="File for the united graft."),
    conflict: Conflict = typer.Option(
        Conflict.first, help="Whose value a coordinate gets that several have."
    ),
    overwrite: bool = typer.Option(False, help="Replace the file at --out."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Unite regions: a sub-model for a group of tasks."""
    from polytask.errors import MergeError
    from polytask.merge.graft_delta import union as unite

    if out.exists() and not overwrite:
        raise MergeError(f"{out} exists: choose another place, or say --overwrite")
    made = unite([_load(path) for path in grafts], conflict.value)
    made.save(out)
    if as_json:
        print(json.dumps({"path": str(out), **_facts(made)}))
    else:
        typer.echo(f"{made}\nwrote {out}")


@app.command()
def purge(
    graft: Path = typer.Argument(help="The region to take out."),
    model: str = typer.Option(help="The model that has the skill: folder or file."),
    base: str = typer.Option(help="The base whose values come back."),
    out: Path = typer.Option(help="Where the purged model goes."),
    overwrite: bool = typer.Option(False, help="Replace what is at --out."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Set a region back to the base's values: one skill less in a multitask model."""
    from polytask.pipeline.graft_files import purge_graft

    _tell(purge_graft(model, base, _load(graft), out, overwrite=overwrite), as_json)


@app.command()
def overlap(
    grafts: list[Path] = typer.Argument(help="Grafts of one base."),
    out: Path | None = typer.Option(None, help="Folder for overlap.html with a heat map."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Which share of each region the others have too: alike tasks overlap more."""
    from polytask.merge.graft_delta import overlap as compare
    from polytask.report.graft_page import overlap_report

    found = [_load(path) for path in grafts]
    names = _names(found, grafts)
    matrix = [[None if x != x else x for x in row] for row in compare(found).tolist()]
    page = None
    if out is not None:
        page = overlap_report(out, names, matrix, [str(graft) for graft in found])
    if as_json:
        facts = [{**_facts(graft), "name": name} for graft, name in zip(found, names, strict=True)]
        print(json.dumps({"grafts": facts, "overlap": matrix}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title="share of column's region that row has too")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for name, row in zip(names, matrix, strict=True):
        table.add_row(name, *("-" if x is None else f"{x:.3f}" for x in row))
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    for graft in found:
        console.print(str(graft))
    if page is not None:
        console.print(f"wrote {page}")


@app.command()
def show(
    graft: Path = typer.Argument(help="A graft file."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Size, origin and place of a graft."""
    from dataclasses import asdict

    from polytask.merge.graft_map import bits_by_module

    found = _load(graft)
    cells = [asdict(cell) for cell in bits_by_module(found) if cell.bits]
    if as_json:
        known = {k: found.facts[k] for k in ("base", "architecture", "scores") if k in found.facts}
        print(json.dumps({**_facts(found), **known, "bits": cells}))
        return
    typer.echo(str(found))
    for cell in cells:
        layer = "-" if cell["layer"] is None else cell["layer"]
        typer.echo(f"  layer {layer}  {cell['module']}: {cell['bits']:,} of {cell['size']:,}")


def _load(path: Path) -> SparseDelta:
    from polytask.merge.graft_delta import SparseDelta

    return SparseDelta.load(path)


def _names(grafts: list[SparseDelta], paths: list[Path]) -> list[str]:
    """The grafts' names; their folders' or files' where names are not unique."""
    names = [graft.name for graft in grafts]
    if len(set(names)) == len(names):
        return names
    folders = [path.resolve().parent.name for path in paths]
    return folders if len(set(folders)) == len(folders) else [str(path) for path in paths]


def _facts(graft: SparseDelta) -> dict[str, Any]:
    return {
        "name": graft.name,
        "count": len(graft),
        "of": graft.layout.size,
        "share": graft.share,
        "tensors": len(graft.layout.shapes),
    }


def _tell(written: Written, as_json: bool) -> None:
    if as_json:
        facts = {"path": str(written.path), "changed": written.changed, "of": written.of}
        print(json.dumps({**facts, "notes": list(written.notes)}))
        return
    typer.echo(f"wrote {written.path}: {written.changed:,} of {written.of:,} parameters changed")
    for note in written.notes:
        typer.echo(note)
