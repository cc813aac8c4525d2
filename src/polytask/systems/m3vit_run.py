"""`polytask run m3vit`: a user's tasks on a trunk with experts, and on a dense one to compare.

Both runs are ordinary ones (`polytask predict` and `polytask report` work on them). Beside them
come the use of experts by task and layer and the cost of a request, as a page and pictures.
Without `--data` scenes of garments are drawn and written as files first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import PositiveInt

from polytask import files
from polytask.models.experts.config import ExpertsConfig
from polytask.systems.base import Outcome, Say, SystemConfig

TEMPLATE = Path(__file__).with_name("24_m3vit.yaml")


class M3ViTRunConfig(SystemConfig):
    """Sheet 24 on one's own tasks. `data` is a configuration for `polytask train`; its own
    `model.experts` goes before `experts` here."""

    experts: ExpertsConfig = ExpertsConfig()
    dense: bool = True  # also train a dense trunk with as many operations per request
    scenes: PositiveInt = 600  # drawn where no data is given


def m3vit_run(config: M3ViTRunConfig, say: Say) -> Outcome:
    """Train with experts, train dense, compare. Finished runs are not trained again."""
    from polytask.pipeline import load_config, train

    path = config.data or made_up(config, say)
    ways = ("experts", "dense") if config.dense else ("experts",)
    scores: dict[str, dict[str, dict[str, Any]]] = {}
    folders = {}
    for way in ways:
        given = load_config(path)
        chosen = given.model.experts or config.experts
        experts = chosen.model_dump(mode="json", exclude_unset=True) if way == "experts" else None
        ratio = given.model.ffn_mult
        if way == "dense":  # as many operations per token as K experts take
            ratio = chosen.k * chosen.mult
        changed = [
            f"name={given.name}-{way}",
            f"model.experts={json.dumps(experts)}",
            f"model.ffn_mult={ratio}",
            "evaluate.single_task=false",
        ]
        settings = load_config(path, changed)
        say(f"training '{settings.name}'")
        run = train(settings, config.out / settings.name, base=path.parent, say=say)
        folders[way] = run.folder
        scores[way] = {row["task"]: row for row in run.scores["tasks"]}
    folder = folders["experts"]
    record = json.loads((folder / "experts.json").read_text(encoding="utf-8"))
    figures = {"scores": scores, "usage": record["usage"], "requests": record["requests"]}
    files.write_json(folder / "m3vit.json", figures)
    names = ("experts.html", "expert-use.png", "expert-overlap.png", "request-cost.png")
    written = [folder / n for n in (*names, "m3vit.json") if (folder / n).is_file()]
    written += [f / "report.html" for f in folders.values()]
    return Outcome(folder, figures, _lines(scores, record), written)


def _lines(scores: Mapping[str, Mapping[str, Any]], record: Mapping[str, Any]) -> list[str]:
    """A line per task, and what the routers did."""
    from polytask.report.experts_page import verdict

    lines = []
    for task, row in scores["experts"].items():
        parts = [
            f"{way} {rows[task]['multitask']:.4f}"
            for way, rows in scores.items()
            if rows[task]["multitask"] is not None
        ]
        request = record["requests"][task]
        share = request["bytes"] / request["all_bytes"]
        lines.append(
            f"{task}: {row['metric']}  {',  '.join(parts)};  {request['flops'] / 1e6:.1f} million "
            f"operations, {share:.0%} of the weights"
        )
    return [*lines, verdict(record)]


def made_up(config: M3ViTRunConfig, say: Say) -> Path:
    """Scenes as pictures and a table, with the configuration beside them."""
    from polytask.data.scenes import SceneSetting, draw_scenes
    from polytask.data.scenes_files import write_scenes

    folder = config.out / "m3vit-scenes"
    path = config.out / "m3vit.yaml"
    say(f"no --data given: {config.scenes} scenes are drawn into {folder}")
    scenes = draw_scenes(SceneSetting(sources=("digits",)), "train", config.scenes, 0)
    write_scenes(folder, scenes)
    files.write_text(path, TEMPLATE.read_text(encoding="utf-8"))
    return path
