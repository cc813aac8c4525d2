"""`polytask run`: a system on one's own data, or on its embedded default."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

app = typer.Typer(add_completion=False)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run(
    context: typer.Context,
    name: str = typer.Argument(help="Number or name of a system: 16, flat-mtl."),
    data: Path | None = typer.Option(
        None, help="Your tasks, as for polytask train; the system's default if omitted."
    ),
    out: Path = typer.Option(Path("runs"), help="Folder that holds run folders."),
    overrides: list[str] = typer.Option(
        [], "--set", metavar="KEY=VALUE", help="One of the system's settings, as in --set rho=.1."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print the outcome as JSON."),
) -> None:
    """Run a system on your own data; `polytask systems NAME` says what it needs.

    A system's own settings may also be given as options: --target y is --set target=y.
    """
    from polytask import systems
    from polytask.configs import parse

    system = systems.load(name)
    given: dict[str, Any] = {"out": out, **_settings([*overrides, *_options(context.args)])}
    if data is not None:
        given["data"] = data
    config = parse(system.config, given, f"polytask run {system.card.slug}")
    outcome = system.run(config, (lambda text: None) if as_json else _say)
    if as_json:
        print(json.dumps(outcome.to_dict(), ensure_ascii=False))
        return
    for line in outcome.lines:
        _say(line)
    _say("wrote " + ", ".join(str(path) for path in outcome.files))


def _options(arguments: list[str]) -> list[str]:
    """'--target y --lag=2' as KEY=VALUE; names are checked with the system's settings."""
    from polytask.errors import ConfigError

    found, rest = [], list(arguments)
    while rest:
        option = rest.pop(0)
        key, equals, value = option.removeprefix("--").partition("=")
        if not option.startswith("--") or not key:
            raise ConfigError(f"'{option}' belongs to no option")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"--{key} needs a value")
            value = rest.pop(0)
        found.append(f"{key.replace('-', '_')}={value}")
    return found


def _settings(overrides: list[str]) -> dict[str, Any]:
    import yaml

    from polytask.errors import ConfigError

    found = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set takes KEY=VALUE, for instance rho=.1 (given: '{text}')")
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {text}: the value is not valid YAML") from error
    return found


def _say(text: str) -> None:
    from rich.console import Console

    Console(highlight=False, soft_wrap=True).print(text)
