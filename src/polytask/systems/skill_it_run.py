"""`polytask run skill-it`: a user's tasks as skills; the graph, the mixture and what they did.

An ordinary run of `polytask train` with `mixture: {policy: skillit}`, whose graph is learned first
unless one is given, beside the same training with equal shares. Without `--data` LEGO is written as
files: chains of assignments, one file per depth.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveInt

from polytask import files
from polytask.systems.base import Outcome, Say, SystemConfig

TEMPLATE = Path(__file__).with_name("50_skill_it.yaml")
PAGES = ("skills.html", "mixture.csv", "mixture-shares.png", "skill-losses.png", "skill-graph.png")


class SkillItRunConfig(SystemConfig):
    """Sheet 50 on one's own tasks. `data` is a configuration for `polytask train`, whose own
    `mixture: {policy: skillit, ...}` goes before these settings, or a YAML mapping
    {name: file of texts}, each a skill of a language model."""

    graph: str = Field(default="auto", description="a graph's JSON file, or auto: learned first")
    graph_mode: Literal["single", "pairwise"] = "single"
    graph_steps: PositiveInt | None = None  # of each run; None: a fifth of the training
    eta: float = Field(default=0.5, gt=0)
    window: PositiveInt = 3
    rounds: PositiveInt = 10  # decisions about the mixture in a run
    compare: bool = True  # also train with equal shares
    text: str = "text"  # a mapping of texts: the column that holds them
    hub: str | None = None  # a mapping of texts: the causal language model to go on with
    steps: PositiveInt = 200  # a mapping of texts: how long
    batch_size: PositiveInt = 8  # a mapping of texts: rows per step
    items: PositiveInt = 1000  # rows per depth, where no data is given


def skill_it_run(config: SkillItRunConfig, say: Say) -> Outcome:
    """Learn the graph, train by it, train with equal shares, compare. Finished runs are kept."""
    from polytask.configs import load_yaml
    from polytask.pipeline import parse_config, train

    if config.data is None:
        values, base = made_up(config, say)
    else:
        values, base = load_yaml(config.data), config.data.parent
        if "tasks" not in values:
            values = texts_config(values, config)
        values.setdefault("name", config.data.stem)
    name = str(values["name"])
    steps = planned_steps(values)
    ways = {"skill-it": _mixture(config, values, steps), "stratified": {"policy": "stratified"}}
    if not config.compare:
        del ways["stratified"]
    runs = {}
    for way, mixture in ways.items():
        judging = {**values.get("evaluate", {}), "single_task": False}
        changed = {**values, "name": f"{name}-{way}", "mixture": mixture, "evaluate": judging}
        settings = parse_config(changed, str(config.data or "polytask run skill-it"))
        say(f"training '{settings.name}'")
        runs[way] = train(settings, config.out / settings.name, base=base, say=say)
    folder = runs["skill-it"].folder
    scores = {way: {row["task"]: row for row in run.scores["tasks"]} for way, run in runs.items()}
    figures: dict[str, Any] = {"scores": scores, "graph": _learned(folder)}
    files.write_json(folder / "skill-it.json", figures)
    written = [folder / page for page in (*PAGES, "skill-it.json") if (folder / page).is_file()]
    written += [run.report for run in runs.values()]
    return Outcome(folder, figures, _lines(folder, scores, figures["graph"]), written)


def _mixture(
    config: SkillItRunConfig, values: Mapping[str, Any], steps: int | None
) -> dict[str, Any]:
    """The `mixture:` section: the user's own if it is Skill-It's, else from the settings."""
    own = dict(values.get("mixture", {}))
    if own.get("policy") == "skillit":
        return own
    graph = config.graph
    if graph != "auto":
        graph = str(Path(graph).resolve())  # given on the command line, not in the configuration
    made: dict[str, Any] = {
        "policy": "skillit",
        "graph": graph,
        "graph_mode": config.graph_mode,
        "eta": config.eta,
        "window": config.window,
    }
    if steps is None and config.graph_steps is None:
        return made  # as many epochs as stated: rounds and the graph's runs as they are by default
    if config.graph_steps is not None or steps is not None:
        made["graph_steps"] = config.graph_steps or max(1, (steps or 0) // 5)
    if steps is not None:
        made["update_steps"] = round_length(steps, config.rounds)
    return made


def planned_steps(values: Mapping[str, Any]) -> int | None:
    """Steps of the run; None where it is planned in epochs or stages."""
    plan = values.get("train", {"steps": 1000})
    steps = plan.get("steps") if isinstance(plan, Mapping) else None
    return steps if isinstance(steps, int) else None


def round_length(steps: int, rounds: int) -> int:
    """The divisor of `steps` that makes as many rounds as asked, or the next fewer."""
    wanted = min(rounds, steps)
    return next(steps // n for n in range(wanted, 0, -1) if steps % n == 0)


def texts_config(mapping: Mapping[str, Any], config: SkillItRunConfig) -> dict[str, Any]:
    """A configuration for {name: data}: each a skill, learned as language, judged by its loss."""
    tasks = {
        str(name): {
            "data": data,
            "schema": "language_model",
            "inputs": {"text": config.text},
        }
        for name, data in mapping.items()
    }
    values: dict[str, Any] = {
        "tasks": tasks,
        "train": {"steps": config.steps, "batch_size": config.batch_size, "progress": False},
    }
    if config.hub is not None:
        values["model"] = {"hub": config.hub}
        values["train"] |= {"lr": 5e-5, "warmup": 0.05, "schedule": "linear"}  # the paper's
    return values


def _learned(folder: Path) -> dict[str, Any] | None:
    """The graph that was learned, and its cost; None for one that was given."""
    path = folder / "graph.json"
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _lines(
    folder: Path, scores: Mapping[str, Mapping[str, Any]], graph: Mapping[str, Any] | None
) -> list[str]:
    """A line per task, what the mixture did, and what the graph cost."""
    from polytask.report.skills_page import read_graph, read_rounds, said

    lines = []
    for task, row in scores["skill-it"].items():
        parts = [
            f"{way} {rows[task]['multitask']:.4f}"
            for way, rows in scores.items()
            if rows[task]["multitask"] is not None
        ]
        lines.append(f"{task}: {row['metric']}  {',  '.join(parts)}")
    lines.append(said(read_rounds(folder), read_graph(folder)))
    if graph is not None:
        learned = graph["learned"]
        lines.append(
            f"The graph took {learned['runs']} runs of {learned['steps']} steps, "
            f"{learned['total_steps']} in all, on top of the training."
        )
    return lines


def made_up(config: SkillItRunConfig, say: Say) -> tuple[dict[str, Any], Path]:
    """LEGO as a file per depth, and the configuration that reads them."""
    from polytask.configs import load_yaml
    from polytask.rng import generator
    from polytask.systems.testbeds import lego

    folder = config.out / "skill-it-lego"
    say(f"no --data given: LEGO, {config.items} chains per depth, is written into {folder}")
    for skill in range(3):
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["text", "answer"])
        for ids in lego.items(generator(0, "lego-file", skill), skill, config.items, 3):
            writer.writerow([lego.words(ids[:-1]), lego.WORDS[ids[-1]]])
        files.write_text(folder / f"depth{skill + 1}.csv", out.getvalue())
    path = config.out / "skill-it.yaml"
    files.write_text(path, TEMPLATE.read_text(encoding="utf-8"))
    return load_yaml(path), config.out
