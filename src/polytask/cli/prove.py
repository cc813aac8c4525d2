"""`polytask prove`: a system against its baselines, judged over paired seeds."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from polytask.study import Evidence, Progress
    from polytask.systems import System

app = typer.Typer(add_completion=False)
NOT_SHOWN = 3  # exit code


class Size(StrEnum):
    full = "full"
    smoke = "smoke"


@app.command()
def prove(
    name: str = typer.Argument(help="Number or name of a system (16, flat-mtl), or 'all'."),
    seeds: int | None = typer.Option(
        None, help="Paired seeds (5; 1 for smoke).", show_default=False
    ),
    seed_base: int = typer.Option(0, help="The first seed."),
    budget: Size = typer.Option(Size.full, help="'smoke' only shows that everything executes."),
    workers: int | None = typer.Option(
        None, help="Processes side by side (one per core; 0: this one).", show_default=False
    ),
    tune: bool = typer.Option(False, help="First choose the arms' settings anew, then judge."),
    out: Path | None = typer.Option(
        None, help="Folder for the record (evidence/).", show_default=False
    ),
    strict: bool = typer.Option(False, help="Exit with 3 if the verdict is not 'shown'."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON line with everything."),
) -> None:
    """Compare a system with its baselines: paired seeds, equal budgets, intervals, a verdict.

    A full run writes evidence/NN-name.json and its pictures, whatever the verdict. Interrupted, it
    goes on where it was.
    """
    from polytask import systems

    full = budget is Size.full
    cores = _cores() if workers is None else workers
    side_by_side = cores if full or workers is not None else 0
    count = seeds if seeds is not None else (5 if full else 1)
    chosen = [c.slug for c in systems.cards() if systems.is_built(c)] if name == "all" else [name]
    shown = True
    for one in chosen:
        system = systems.load(one)
        if tune:
            _tune(system, cores, _quiet if as_json else _say)
        evidence = _judge(system, count, seed_base, budget.value, side_by_side, as_json)
        path = _write(evidence, out) if full else None
        if as_json:
            print(json.dumps(_facts(evidence, path), ensure_ascii=False))
        else:
            _show(evidence, path)
        shown = shown and evidence.verdict == "shown"
    if strict and full and not shown:
        raise typer.Exit(NOT_SHOWN)


def _judge(
    system: System, seeds: int, seed_base: int, size: Any, workers: int, quiet: bool
) -> Evidence:
    """All arms over all seeds, and what the system reports beside its claims."""
    from polytask import study, systems

    evidence = study.prove(
        system,
        seeds,
        seed_base,
        size,
        workers=workers,
        threads=1,
        on_result=None if quiet else _tell,
    )
    if isinstance(system, systems.Reporting):
        notes = {**evidence.notes, "reported": system.reported(evidence)}
        evidence = replace(evidence, notes=notes)
    return evidence


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _tune(system: System, workers: int, say: Callable[[str], None]) -> None:
    from polytask.errors import UserError
    from polytask.study import Executor
    from polytask.systems import Tunable
    from polytask.systems.base import write_tuning

    if not isinstance(system, Tunable):
        raise UserError(f"system '{system.card.slug}' has nothing to tune: leave --tune out")
    say("choosing settings on the tuning seeds ...")
    write_tuning(system.tuning_file, system.tune(Executor(workers, threads=1)))
    say(f"wrote {system.tuning_file}")


def _write(evidence: Evidence, out: Path | None) -> Path:
    """The record, its page and its pictures."""
    from polytask.report import proof_report
    from polytask.systems import evidence_folders

    checkout, *package = evidence_folders()  # an installed package has only its own: not written to
    folder = out or (checkout if package else Path("evidence"))
    path = evidence.write(folder)
    proof_report(evidence, folder)
    return path


def _facts(evidence: Evidence, path: Path | None) -> dict[str, Any]:
    """The last JSON line: arms, seeds, metrics, intervals, verdicts."""
    return {
        "name": evidence.name,
        "size": evidence.size,
        "verdict": evidence.verdict,
        "reason": evidence.reason,
        "seeds": evidence.seeds,
        "arms": {
            name: {
                "params": arm.params,
                "metrics": {m: arm.values(m) for m in arm.trials[0].metrics},
                "spent": [trial.spent.measured() for trial in arm.trials],
            }
            for name, arm in evidence.arms.items()
        },
        "claims": [
            {
                "text": j.claim.text,
                "metric": j.claim.metric,
                "kind": j.claim.kind,
                "differences": j.differences,
                "interval": None if j.t is None else [j.t.mean, j.t.low, j.t.high],
                "verdict": j.verdict,
            }
            for j in evidence.judgements
        ],
        "reported": evidence.notes.get("reported", []),
        "seconds": evidence.seconds,
        "evidence": None if path is None else str(path),
    }


def _show(evidence: Evidence, path: Path | None) -> None:
    import statistics

    from rich.console import Console
    from rich.table import Table

    metrics = list(dict.fromkeys(j.claim.metric for j in evidence.judgements))
    table = Table(title=f"{evidence.title}: mean over {len(evidence.seeds)} seed(s)")
    table.add_column("arm", no_wrap=True)
    for metric in metrics:
        table.add_column(metric, justify="right")
    for name, arm in evidence.arms.items():
        cells = []
        for metric in metrics:
            values = [v for v in arm.values(metric) if v is not None]
            cells.append(f"{statistics.fmean(values):.4f}" if values else "-")
        table.add_row(name, *cells)
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    for judgement in evidence.judgements:
        console.print(judgement.sentence)
    for sentence in evidence.notes.get("reported", []):
        console.print(f"[dim]reported: {sentence}[/dim]")
    for note in sorted({arm.note for arm in evidence.arms.values() if arm.note}):
        console.print(f"[dim]data: {note}[/dim]")
    console.print(f"[bold]{evidence.verdict}[/bold]: {evidence.reason}")
    if path is not None:
        console.print(f"record: {path}")


def _tell(progress: Progress) -> None:
    how = " (found)" if progress.reused else ""
    typer.echo(
        f"[{progress.done}/{progress.total}] {progress.arm}, seed {progress.seed}{how}", err=True
    )


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _quiet(text: str) -> None:
    """With --json only the JSON line is printed."""
