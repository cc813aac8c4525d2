"""`polytask merge`: models trained apart become one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from polytask.merge.plan import Plan

app = typer.Typer(add_completion=False)


@app.command()
def merge(
    config: Path = typer.Argument(help="A YAML file, ours or mergekit's."),
    out: Path | None = typer.Option(None, help="Folder to write; instead of 'out' in the file."),
    dry_run: bool = typer.Option(False, help="Check everything, print the plan, and stop."),
    compare: bool = typer.Option(
        False, help="Score base, models and merge on the tasks under 'compare'."
    ),
    scales: str | None = typer.Option(
        None, metavar="FIRST:LAST:STEP", help="Also score base + s (merge - base), as in 0:1:0.1."
    ),
    overwrite: bool = typer.Option(False, help="Replace a folder that exists."),
    workers: int | None = typer.Option(None, min=1, help="Tensors in work at once."),
    memory: str | None = typer.Option(None, help="For tensors in work together, as in 2GB."),
    report: bool = typer.Option(True, help="Write the page with the pictures."),
    as_json: bool = typer.Option(False, "--json", help="Print what was done as JSON."),
) -> None:
    """Merge models that were trained apart from one base.

    Everything is checked before the first tensor is read. Interrupted or out of disk, the same
    command goes on where it stopped; the folder appears when it is complete.
    """
    from polytask.errors import ConfigError
    from polytask.merge.anatomy import check_kinship
    from polytask.merge.config import CompareConfig, read_recipe
    from polytask.merge.output import write
    from polytask.merge.plan import check_disk, make_plan
    from polytask.merge.recipe import bytes_of
    from polytask.pipeline import learned, merging

    learning = learned.find_learning(config)
    recipe, ours = (learning.recipe, learning.config) if learning else read_recipe(config)
    plan = make_plan(recipe)
    found = None if ours is None else ours.compare
    if ours is not None and ours.out is not None and out is None:
        out = config.parent / ours.out
    settings = found or CompareConfig()
    if scales is not None:
        settings = settings.model_copy(update={"scales": _scales(scales)})
        compare = True
    judges = merging.find_judges(plan, settings, config.parent) if compare else []
    if dry_run:
        if out is not None:
            check_disk(plan, out)
        if learning is not None:
            learning.voices(plan)
        _show_plan(plan, as_json)
        return
    if out is None:
        raise ConfigError("say where to write: --out FOLDER, or 'out: FOLDER' in the file")
    notes = [*plan.notes, *check_kinship(plan)]
    if not as_json:
        for note in notes:
            _say(f"note: {note}")
    with _progress(quiet=as_json) as (advance, say):
        learnt = None
        if learning is not None:
            learned.check_free(out, overwrite)
            recipe, learnt = learning.learn(plan, say)
            plan = make_plan(recipe)
        folder = write(
            plan,
            out,
            workers=workers,
            memory=None if memory is None else bytes_of(memory),
            overwrite=overwrite,
            progress=advance,
        )
        if learnt is not None:
            learned.write_traces(folder, learnt)
            notes += learnt.warnings
        compared = merging.compare(plan, folder, judges, settings, say) if compare else None
        page = merging.report(plan, folder, compared, say) if report else None
    if as_json:
        told: dict[str, Any] = {"folder": str(folder), "notes": notes}
        told["report"] = None if page is None else str(page)
        told |= _summary(plan)
        if compared is not None:
            told["compare"] = compared.to_dict()
        print(json.dumps(told))
        return
    if compared is not None:
        _show_scores(compared)
    _say(f"wrote {folder} ({plan.size / 1e6:,.0f} MB)")
    if page is not None:
        _say(f"[bold]Look at[/bold] {page}")


def _scales(text: str) -> tuple[float, ...]:
    """'0:1:0.25' -> (0, .25, .5, .75, 1)."""
    from polytask.errors import ConfigError

    try:
        first, last, step = (float(part) for part in text.split(":"))
        if step <= 0 or last < first or (last - first) / step > 1000:
            raise ValueError
    except ValueError:
        raise ConfigError(f"--scales {text}: give FIRST:LAST:STEP, for instance 0:1:0.1") from None
    count = int((last - first) / step + 1e-9) + 1
    return tuple(round(first + step * i, 10) for i in range(count))


def _summary(plan: Plan) -> dict[str, Any]:
    copied = [item for item in plan.items if item.action == "copy"]
    largest = max(plan.items, key=lambda item: item.memory, default=None)
    return {
        "method": plan.recipe.method,
        "parameters": plan.method.model_dump(mode="json"),
        "models": list(plan.names),
        "tensors": {"merged": len(plan.merged), "copied": len(copied), "tied": len(plan.aliases)},
        "values": sum(item.count for item in plan.items),
        "bytes": plan.size,
        "shards": [
            {"file": s.file, "bytes": s.size, "tensors": len(s.places)} for s in plan.shards
        ],
        "passes": list(plan.method.passes),
        "working_memory": 0 if largest is None else largest.memory,
        "heads": {
            plan.sources[n].name: list(plan.heads[n]) for n in plan.recipe.experts if plan.heads[n]
        },
    }


def _show_plan(plan: Plan, as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    told = _summary(plan)
    if as_json:
        print(json.dumps({**told, "notes": list(plan.notes)}))
        return
    base = plan.recipe.base
    models = Table(title=f"{plan.method.title} of {len(plan.names)} models")
    for heading in ("model", "from", "tensors", "MB", "types"):
        models.add_column(heading, justify="right" if heading in ("tensors", "MB") else "left")
    for number, source in enumerate(plan.sources):
        spec = plan.recipe.models[number]
        types = sorted({str(h.dtype).removeprefix("torch.") for h in source.headers.values()})
        models.add_row(
            f"{source.name} (base)" if number == base and source.name != "base" else source.name,
            spec.where + (f" + {spec.adapter}" if spec.adapter else ""),
            f"{len(source.headers):,}",
            f"{sum(h.nbytes for h in source.headers.values()) / 1e6:,.1f}",
            ", ".join(types),
        )
    Console().print(models)
    result = Table(title="result", show_header=False)
    counts = told["tensors"]
    rows = [
        ("merged tensors", f"{counts['merged']:,}"),
        ("copied tensors", f"{counts['copied']:,}"),
        ("tied names", f"{counts['tied']:,}"),
        ("values", f"{told['values']:,}"),
        ("files", ", ".join(f"{s['file']} ({s['bytes'] / 1e6:,.1f} MB)" for s in told["shards"])),
        ("passes before merging", ", ".join(told["passes"]) or "none"),
        ("working memory", f"{told['working_memory'] / 1e6:,.1f} MB a tensor at most"),
        *((f"head of {name}", ", ".join(keys)) for name, keys in told["heads"].items()),
        *(("parameter", f"{key}: {value}") for key, value in told["parameters"].items()),
    ]
    for row in rows:
        result.add_row(*row)
    Console().print(result)
    for note in plan.notes:
        _say(f"note: {note}")
    _say("all checks passed; nothing was read but headers, and nothing written")


def _show_scores(compared: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="what the merge is worth, on the same rows")
    for heading in ("task", "metric"):
        table.add_column(heading)
    for heading in (*compared.columns, "merge - own model", "95 % interval"):
        table.add_column(heading, justify="right")
    for row in compared.rows:
        mean, low, high = row.gain
        values = [f"{row.values[column]:.4g}" for column in compared.columns]
        arrow = "↑" if row.higher_is_better else "↓"
        interval = f"{low:+.3f} to {high:+.3f}"
        table.add_row(row.task, f"{row.metric} {arrow}", *values, f"{mean:+.3f}", interval)
    Console().print(table)


@contextmanager
def _progress(quiet: bool) -> Iterator[tuple[Any, Any]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    shown = not quiet and console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
        tasks: dict[str, Any] = {}

        def advance(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)

        def say(text: str) -> None:
            if shown:
                bar.console.print(text, highlight=False)

        yield advance, say


def _say(text: str) -> None:
    from rich.console import Console

    Console(highlight=False, soft_wrap=True).print(text)
