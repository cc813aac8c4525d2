"""`polytask mixture`: learn a skill graph of one's tasks, look at a graph or at a run's mixture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

app = typer.Typer(add_completion=False)


@app.callback()
def mixture() -> None:
    """Skill graphs and mixtures over skills."""


@app.command()
def graph(
    config: Path = typer.Argument(help="A configuration, as for polytask train."),
    out: Path = typer.Option(Path("graph.json"), help="Where the graph is written."),
    steps: int = typer.Option(200, min=1, help="Steps of every run."),
    mode: str = typer.Option(
        "single", help="single: a run per task. pairwise: also a run per pair of tasks."
    ),
    judged: list[str] = typer.Option(
        [], "--eval", metavar="TASK", help="A task that is judged and not trained on; repeat."
    ),
    overrides: list[str] = typer.Option(
        [], "--set", metavar="KEY=VALUE", help="Change one key, as in --set train.lr=0.001."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print the graph as JSON."),
) -> None:
    """Learn which task helps which, from short runs with the same start.

    An interrupted call goes on where it stopped. Use the graph with
    `mixture: {policy: skillit, graph: graph.json}`.
    """
    from polytask.errors import ConfigError, suggestion
    from polytask.pipeline import load_config
    from polytask.pipeline.prepare import prepare
    from polytask.pipeline.skill_runs import learn

    modes = ("single", "pairwise")
    if mode not in modes:
        raise ConfigError(f"--mode {mode}: there is no such mode.{suggestion(mode, modes)}")
    say = (lambda text: None) if as_json else _say
    settings = load_config(config, ["mixture.policy=uniform", *overrides])
    prepared = prepare(settings, config.parent, say)
    names = [group.name for group in prepared.taskset.groups]
    for name in judged:
        if name not in names:
            raise ConfigError(f"--eval {name}: no such task.{suggestion(name, names)}")
    runs = out.with_name(f"{out.stem}-runs")
    found = learn(prepared, runs, steps, mode, eval_only=judged, say=say)  # type: ignore[arg-type]
    found.save(out)
    if as_json:
        print(json.dumps({**found.graph.to_dict(), "learned": found.to_dict()}))
        return
    _show_graph(found.graph)
    _say(f"{found.runs} runs, {found.total_steps} steps in all. Wrote {out}; losses are in {runs}")


@app.command()
def show(
    path: Path = typer.Argument(help="A graph's JSON file, or a run folder."),
    as_json: bool = typer.Option(False, "--json", help="Print it as JSON."),
) -> None:
    """Print a skill graph, or the shares of every round of a run; a run also gets skills.html."""
    from polytask.mixture import SkillGraph

    if path.is_dir():
        _show_run(path, as_json)
        return
    found = SkillGraph.load(path)
    if as_json:
        print(json.dumps(found.to_dict()))
        return
    _show_graph(found)


def _show_run(folder: Path, as_json: bool) -> None:
    from polytask.report.skills_page import read_rounds, skills_page

    rounds = read_rounds(folder)
    if as_json:
        print(json.dumps(rounds))
        return
    names = list(rounds[0]["shares"])
    rows = [[str(r["after"]), *(f"{r['shares'][n]:.3f}" for n in names)] for r in rounds]
    _table(["after steps", *names], rows, f"shares of {folder}")
    _say(f"wrote {skills_page(folder)}")


def _show_graph(found: Any) -> None:
    rows = [
        [name, *(f"{value:.3f}" for value in row)]
        for name, row in zip(found.train_names, found.A, strict=True)
    ]
    _table(["training on ... helps", *found.eval_names], rows, "skill graph")


def _table(heads: list[str], rows: list[list[str]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)


def _say(text: str) -> None:
    from rich.console import Console

    Console(highlight=False, soft_wrap=True).print(text)
