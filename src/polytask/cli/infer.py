"""`polytask infer fuse`: a large model moved by small experts, token by token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

app = typer.Typer(
    help="Use models together: fuse the logits of a large model and small experts.",
    no_args_is_help=True,
    add_completion=False,
)


@app.callback()
def infer() -> None:
    """Use models together."""


@app.command("fuse", context_settings={"allow_extra_args": True, "allow_interspersed_args": True})
def fuse(
    context: typer.Context,
    large: str | None = typer.Option(None, help="Large model: folder, hub id or run folder."),
    base: str | None = typer.Option(None, help="The small model the experts were tuned from."),
    experts: list[str] = typer.Option(
        [], help="Experts, all after one --experts: --experts maths law."
    ),
    prompt: list[str] = typer.Option([], help="A text to continue; may be given several times."),
    file: Path | None = typer.Option(
        None, help="Prompts: .jsonl ('prompt' or 'text' a line); any other file is one prompt."
    ),
    shots: Path | None = typer.Option(
        None, help="Text before every prompt for the large model only (examples)."
    ),
    score: bool = typer.Option(False, help="Score the given texts instead of continuing them."),
    grid: str = typer.Option("0:2:.1", help="Strengths to try: start:stop:step, or a list."),
    mode: str = typer.Option(
        "single", help="single: one expert a token; joint: all combinations; static: --alpha."
    ),
    alpha: str | None = typer.Option(None, help="static: one strength, or one per expert (1,.5)."),
    bounds: str | None = typer.Option(None, help="low:high for each expert: 0:1,0:.5"),
    refine: str = typer.Option("none", help="golden: search between the grid's points."),
    max_new: int = typer.Option(64, min=1, help="Tokens to write at most."),
    temperature: float = typer.Option(0.0, min=0, help="0: the most likely token."),
    top_k: int = typer.Option(0, min=0, help="0: all tokens."),
    top_p: float = typer.Option(1.0, min=0, max=1),
    seed: int = typer.Option(0, min=0),
    stop: list[str] = typer.Option([], help="A text that ends the writing."),
    dtype: str = typer.Option("float32", help="float32, bfloat16 or float16."),
    device: str = typer.Option("cpu"),
    out: Path = typer.Option(Path("runs"), help="Folder that holds run folders."),
    as_json: bool = typer.Option(False, "--json", help="Print everything as JSON."),
) -> None:
    """Continue prompts with a large model that small experts steer, token by token.

    Without models, small ones of characters are trained once, for a first look.
    """
    from polytask.configs import parse
    from polytask.errors import ConfigError
    from polytask.systems.fusion_run import FusionRunConfig, fusion_run

    if context.args and not experts:
        raise ConfigError(f"'{context.args[0]}' belongs to no option")
    given: dict[str, Any] = {
        "large": large,
        "base": base,
        "experts": (*experts, *context.args),
        "prompt": tuple(prompt),
        "data": file,
        "shots": shots,
        "score": score,
        "grid": grid,
        "mode": mode,
        "bounds": bounds,
        "refine": refine,
        "max_new": max_new,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "stop": tuple(stop),
        "dtype": dtype,
        "device": device,
        "out": out,
    }
    if alpha is not None:
        given["alpha"] = alpha
    config = parse(FusionRunConfig, given, "polytask infer fuse")
    if as_json:
        outcome = fusion_run(config, lambda text: None)
        print(json.dumps(outcome.to_dict(), ensure_ascii=False))
        return
    streamed: list[str] = []

    def stream(piece: str) -> None:
        if not streamed:
            print(prompt[0] if prompt else "", end="")
        streamed.append(piece)
        print(piece, end="", flush=True)

    outcome = fusion_run(config, lambda text: typer.echo(text, err=True), stream)
    if streamed:
        print()
    _show(outcome.figures, outcome.lines if not streamed else outcome.lines[-1:])
    typer.echo("wrote " + ", ".join(str(path) for path in outcome.files), err=True)


def _show(figures: Any, lines: Any) -> None:
    """The first steps as a table, then what there is to say."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("text", "step", "token", "expert", "strength", "KL(fused|large)", "loss"):
        table.add_column(name, justify="left" if name in ("token", "expert") else "right")
    for number, one in enumerate(figures["results"], 1):
        for step, token in enumerate(one["tokens"][:12], 1):
            cells = [str(number), str(step), escape(repr(token["text"])), escape(token["expert"])]
            cells += [f"{token['alpha']:g}", f"{token['moved']:.4f}", f"{token['loss']:.2e}"]
            table.add_row(*cells)
    if figures["tokens"]:
        console.print(table)
        console.print()
    for line in lines:
        console.print(escape(line))
