"""`polytask run mhr` and `polytask run scalearn`: adapters on a user's tasks, and their pages.

Both leave ordinary runs (`polytask predict`, `polytask adapt --from` work on them) with their
adapters in a folder of their own, pictures of what was routed or scaled, and scores.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveFloat, PositiveInt

from polytask.errors import ConfigError, suggestion
from polytask.systems.base import Outcome, Say, SystemConfig

HERE = Path(__file__).parent


class MHRRunConfig(SystemConfig):
    """Sheet 19 on one's own tasks: several of them, and a pretrained model (model.hub)."""

    modules: PositiveInt = 8
    heads: PositiveInt = 8
    rank: PositiveInt = 4
    gate: Literal["relaxed", "sigmoid", "straight_through", "l2"] = "relaxed"
    routing_lr: PositiveFloat = 0.1


class ScaLearnRunConfig(SystemConfig):
    """Sheet 18 on one's own tasks: stage 1 on all of them, stage 2 for `target`."""

    target: str | None = None  # the last task
    variant: Literal["scalearn", "uniform", "scalearn++", "uniform++"] = "scalearn"
    reduction: PositiveInt = 16
    shots: PositiveInt | None = None  # training rows per class of the target in stage 2


def mhr_run(config: MHRRunConfig, say: Say) -> Outcome:
    """Train an inventory on all tasks."""
    keys = ("modules", "heads", "rank", "gate", "routing_lr")
    adapt = {"method": "mhr", **{key: getattr(config, key) for key in keys}}
    path = config.data or HERE / "19_mhr.yaml"
    run = _train(path, "mhr", adapt, config.out, say, [])
    record = _record(run.folder)
    lines = [*_scores(run), str(record["told"]), _next(run.folder)]
    return Outcome(run.folder, {"scores": run.scores, "adapters": record}, lines, _files(run))


def scalearn_run(config: ScaLearnRunConfig, say: Say) -> Outcome:
    """One adapter per task; then scales over all of them for the target, beside its own adapter."""
    from polytask.pipeline import load_config

    path = config.data or HERE / "18_scalearn.yaml"
    tasks = list(load_config(path).tasks)
    target = config.target or tasks[-1]
    if target not in tasks:
        raise ConfigError(f"target: there is no task '{target}'.{suggestion(target, tasks)}")
    own: dict[str, Any] = {"method": "bottleneck", "reduction": config.reduction}
    say(f"stage 1: an adapter for each of {len(tasks)} tasks")
    first = _train(path, "sources", own, config.out, say, [])
    scales: dict[str, Any] = {
        "method": "scalearn",
        "variant": config.variant,
        "sources": [str((first.folder / "model" / "adapters").resolve())],
    }
    if config.shots is not None:
        scales["shots"] = config.shots
    say(f"stage 2: scales of all adapters for '{target}'")
    second = _train(path, f"scales-{target}", scales, config.out, say, [target])
    record = _record(second.folder)
    before = {row["task"]: row for row in first.scores["tasks"]}[target]
    after = second.scores["tasks"][0]
    lines = [
        f"{target}: {after['metric']} {_number(after)} with scales over {len(tasks)} adapters, "
        f"{_number(before)} with its own adapter",
        str(record["told"]),
        *_ranking(record, target),
    ]
    figures = {"own": before, "scaled": after, "adapters": record}
    return Outcome(second.folder, figures, lines, [*_files(first), *_files(second)])


def _train(
    path: Path, ending: str, adapt: Mapping[str, Any], out: Path, say: Say, tasks: list[str]
) -> Any:
    """The configuration's tasks (or some of them) with an `adapt` section of ours."""
    from polytask.configs import load_yaml
    from polytask.pipeline import parse_config, train

    data = load_yaml(path)
    data["name"] = f"{data.get('name', path.stem)}-{ending}"
    data["adapt"] = dict(adapt)
    data.setdefault("evaluate", {})
    data["evaluate"] = {**data["evaluate"], "single_task": False}
    if tasks:
        data["tasks"] = {name: data["tasks"][name] for name in tasks}
        data.pop("mixture", None)
    settings = parse_config(data, str(path))
    return train(settings, out / settings.name, base=path.parent, say=say)


def _record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapters.json").read_text(encoding="utf-8"))
    return found


def _number(row: Mapping[str, Any]) -> str:
    return "-" if row["multitask"] is None else f"{row['multitask']:.4f}"


def _scores(run: Any) -> list[str]:
    return [f"{row['task']}: {row['metric']} {_number(row)}" for row in run.scores["tasks"]]


def _next(folder: Path) -> str:
    return f"A new task with few rows: polytask adapt new.yaml --from {folder} --tune z --shots 32"


def _ranking(record: Mapping[str, Any], target: str) -> list[str]:
    """Sources by the size of their scales, averaged over layers."""
    import numpy as np

    tables = [np.asarray(w, float)[0].mean(0) for w in record["routing"]["weight"].values()]
    mean = np.mean(tables, 0)
    order = np.argsort(-np.abs(mean))
    told = ", ".join(f"{record['sources'][i]} {mean[i]:+.3f}" for i in order)
    return [f"sources of '{target}' by mean scale: {told}"]


def _files(run: Any) -> list[Path]:
    return [run.report, run.folder / "adapters.html", run.folder / "model" / "adapters"]
