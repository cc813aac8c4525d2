"""`polytask adapt`: add tasks to a trained model with few parameters and few examples."""

from __future__ import annotations

import json
from pathlib import Path

import typer

app = typer.Typer(add_completion=False)


@app.command()
def adapt(
    config: Path = typer.Argument(
        help="A YAML configuration with the new tasks and, perhaps, a section 'adapt'."
    ),
    source: str | None = typer.Option(
        None, "--from", help="A finished run to adapt, instead of the configuration's adapt.from."
    ),
    hub: str | None = typer.Option(
        None, help="A hub model to adapt: id, folder or embedded:NAME (model.hub)."
    ),
    method: str | None = typer.Option(
        None, help="mhr, poly, task-lora, bottleneck, scalearn, fusion, lora, ia3, prompt."
    ),
    tune: str | None = typer.Option(
        None, help="What of a routed inventory is tuned: full, z (rows only), mu (its mean), rand."
    ),
    shots: int | None = typer.Option(None, help="Training rows per class; all when left out."),
    out: Path = typer.Option(Path("runs"), help="Folder that holds run folders."),
    name: str | None = typer.Option(None, help="Name of the run folder instead of the config's."),
    overrides: list[str] = typer.Option(
        [], "--set", metavar="KEY=VALUE", help="Change one key, as in --set train.steps=100."
    ),
    fresh: bool = typer.Option(False, help="Discard an earlier run of this name and start over."),
    as_json: bool = typer.Option(False, "--json", help="Print scores and shares as JSON."),
) -> None:
    """Adapt a multitask run or a hub model to new tasks.

    The base stays frozen; adapters and heads train. The result is a run like any other.
    """
    from polytask.cli.train import _say, _show
    from polytask.pipeline import load_config
    from polytask.pipeline.training import train

    given = {"from": source, "method": method, "tune": tune, "shots": shots}
    changes = [f"adapt.{key}={value}" for key, value in given.items() if value is not None]
    changes += [f"model.hub={hub}"] if hub is not None else []
    changes += [f"name={name}"] if name else []
    settings = load_config(config, [*overrides, *changes])
    if settings.adapt is None:
        settings = load_config(config, [*overrides, *changes, "adapt={}"])
    say = (lambda text: None) if as_json else _say
    run = train(settings, out / settings.name, base=config.parent, fresh=fresh, say=say)
    record = json.loads((run.folder / "adapters.json").read_text(encoding="utf-8"))
    if as_json:
        print(json.dumps({"scores": run.scores, "adapters": record}))
        return
    _show(run.scores)
    _say(f"\n{record['told']}")
    _say(f"[bold]Look at[/bold] {run.report} and {run.folder / 'adapters.html'}")
    _say(f"Adapters alone: {run.folder / 'model' / 'adapters'}")
    example = next(iter(settings.tasks))
    _say(f"Use it:  polytask predict {run.folder} --task {example} FILE")
