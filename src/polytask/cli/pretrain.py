"""`polytask pretrain`: go on with the pretraining of a language model on one's own text."""

from __future__ import annotations

import json
from pathlib import Path

import typer

app = typer.Typer(add_completion=False)


@app.command()
def pretrain(
    config: Path = typer.Argument(help="A YAML configuration: model, objective, corpus, train."),
    out: Path = typer.Option(Path("runs"), help="Folder that holds run folders."),
    name: str | None = typer.Option(None, help="Name of the run folder instead of the config's."),
    overrides: list[str] = typer.Option(
        [], "--set", metavar="KEY=VALUE", help="Change one key, as in --set train.steps=100."
    ),
    fresh: bool = typer.Option(False, help="Discard an earlier run of this name and start over."),
    check: bool = typer.Option(False, help="Load the model, print the plan, then stop."),
    as_json: bool = typer.Option(False, "--json", help="Print plan or scores as JSON."),
) -> None:
    """Pretrain a language model, or go on with one: full LM, prefix LM, span corruption, UL2.

    Run again after an interruption and it goes on where it stopped, bit for bit.
    """
    from polytask.pipeline.pretraining import plan_pretraining
    from polytask.pipeline.pretraining import pretrain as pretrain_run
    from polytask.pipeline.pretraining_config import load_pretrain_config

    settings = load_pretrain_config(config, [*overrides, *([f"name={name}"] if name else [])])
    say = (lambda text: None) if as_json else _say
    if check:
        plan, _, _ = plan_pretraining(settings, config.parent, say)
        if as_json:
            print(json.dumps(dict(plan.facts)))
            return
        for line in plan.lines():
            _say(line)
        _say(f"{config}: all checks passed")
        return
    run = pretrain_run(settings, out / settings.name, config.parent, fresh, say)
    if as_json:
        print(json.dumps(run.scores))
        return
    _show(run.scores)
    _say(f"\n[bold]Look at[/bold] {run.report}")


def _say(text: str) -> None:
    from rich.console import Console

    Console(highlight=False, soft_wrap=True).print(text)


def _show(scores: dict[str, dict[str, dict[str, float]]]) -> None:
    """Held-out losses by denoiser, before and after."""
    from rich.console import Console
    from rich.table import Table

    if not scores["after"]:
        return
    table = Table(title="-log p per token of held-out text")
    table.add_column("denoiser")
    for heading in ("before", "after", "change"):
        table.add_column(heading, justify="right")
    for task, found in scores["after"].items():
        before, after = scores["before"][task]["nll"], found["nll"]
        table.add_row(task, f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}")
    Console().print(table)
