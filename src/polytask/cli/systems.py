"""`polytask systems`: the 64 systems with their verdicts, or one system's card."""

from __future__ import annotations

import json
import textwrap
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from polytask.systems import Card, Status

app = typer.Typer(add_completion=False)
COLOURS = {"shown": "green", "not shown": "yellow", "contradicted": "red", "planned": "dim"}


@app.command()
def systems(
    name: str | None = typer.Argument(
        None, help="Number or name: 16, flat-mtl, FlatMTL.", show_default=False
    ),
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of text."),
) -> None:
    """List the 64 systems with stage, modality and verdict, or print one system's card."""
    from polytask import systems as catalogue

    if name is None:
        found = [(card, catalogue.status(card)) for card in catalogue.cards()]
        if as_json:
            print(json.dumps([_row(card, status) for card, status in found], ensure_ascii=False))
        else:
            _show_table(found)
        return
    card = catalogue.card(name)
    status = catalogue.status(card)
    if as_json:
        print(json.dumps(_facts(card, status), ensure_ascii=False))
    else:
        _show_card(card, status)


def _row(card: Card, status: Status) -> dict[str, Any]:
    return {
        "number": card.number,
        "slug": card.slug,
        "name": card.name,
        "stages": list(card.stages),
        "modalities": list(card.modalities),
        "verdict": status.verdict,
    }


def _facts(card: Card, status: Status) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        **asdict(card),
        "verdict": status.verdict,
        "evidence": None if status.path is None else str(status.path),
        "proved": _proved(status),
    }


def _proved(status: Status) -> list[str]:
    """The record's sentences: claims first, then what was only reported."""
    if status.record is None:
        return []
    judged = [str(j["sentence"]) for j in status.record.get("judgements", [])]
    return judged + [f"reported: {s}" for s in status.record.get("notes", {}).get("reported", [])]


def _show_table(found: list[tuple[Card, Status]]) -> None:
    from collections import Counter

    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("nr", justify="right", no_wrap=True)
    table.add_column("system", no_wrap=True)
    table.add_column("stages", min_width=16)
    table.add_column("modalities", min_width=11)
    table.add_column("verdict", no_wrap=True)
    for card, status in found:
        table.add_row(
            f"{card.number:02d}",
            card.name,
            " ".join(card.stages),
            " ".join(card.modalities),
            _coloured(status.verdict),
        )
    console = Console()
    console.print(table)
    counts = Counter(status.verdict for _, status in found)
    console.print("\n" + ", ".join(f"{n} {verdict}" for verdict, n in counts.most_common()))
    console.print("[dim]polytask systems NAME prints a card; polytask prove NAME judges it[/dim]")


def _coloured(verdict: str) -> str:
    colour = COLOURS.get(verdict, "cyan")
    return f"[{colour}]{verdict}[/{colour}]"


def _show_card(card: Card, status: Status) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)
    width = min(100, console.width) - 2
    verdict = _coloured(status.verdict)
    console.print(f"[bold]{card.number:02d} {escape(card.name)}[/bold]  {verdict}")
    console.print(escape(textwrap.fill(card.title, width)))
    source = f"{card.authors}, {card.year}, https://arxiv.org/abs/{card.arxiv}"
    console.print(f"[dim]{escape(source)}[/dim]")
    console.print(
        f"[dim]stages: {', '.join(card.stages)}; data: {', '.join(card.modalities)}[/dim]"
    )
    proved = _proved(status)
    if not proved:
        why = f"polytask prove {card.slug}" if card.use else "planned: the card exists, no code yet"
        proved = [f"nothing yet ({why})"]
    sections = {
        "What it claims": _filled([card.claim], width),
        "What it needs": _filled([card.needs], width),
        "Where it fails": _filled([card.limits], width),
        "How to use it": [f"  {line}".rstrip() for line in card.use.splitlines()],
        "How a proof is measured": _filled([card.proof], width),
        "What was proved": _filled(proved, width),
    }
    for heading, lines in sections.items():
        if lines:
            console.print(f"\n[bold]{heading}[/bold]")
            console.print(escape("\n".join(lines)))
    if status.path is not None:
        console.print(f"\n[dim]record: {status.path}[/dim]")


def _filled(sentences: list[str], width: int) -> list[str]:
    return [textwrap.indent(textwrap.fill(text, width), "  ") for text in sentences]
