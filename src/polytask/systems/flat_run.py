"""`polytask run flat-mtl`: a user's tasks trained with and without looking for flat regions.

Both runs are ordinary ones (`polytask predict`, `polytask report` work on them); beside them come
the sharpness of every task and a picture of the loss along its steepest direction.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import PositiveInt, field_validator

from polytask import files
from polytask.systems.base import Outcome, Say, SystemConfig
from polytask.train.flat_config import SharpnessConfig

DEFAULT = Path(__file__).with_name("16_flat_mtl.yaml")


class FlatRunConfig(SystemConfig, SharpnessConfig):
    """Sheet 16 on one's own tasks; rho and the rest as in `SharpnessConfig`."""

    aggregator: str = "cagrad"
    plain: bool = True  # also train without looking for flat regions, to compare
    rows: PositiveInt = 256  # training rows on which sharpness is measured

    @field_validator("aggregator")
    @classmethod
    def _known(cls, name: str) -> str:
        from polytask.train.aggregation import aggregators

        aggregators.get(name)
        return name


def flat_run(config: FlatRunConfig, say: Say) -> Outcome:
    """Train, measure, compare. Runs that are finished already are not trained again."""
    from polytask.pipeline import load_config, train
    from polytask.systems import flat_curves
    from polytask.train.trackers import METRICS, read_lines

    path = config.data or DEFAULT
    ways = ("flat", "plain") if config.plain else ("flat",)
    scores: dict[str, dict[str, dict[str, Any]]] = {}
    curves: dict[str, dict[str, Any]] = {}
    folders = {}
    for way in ways:
        name = str(load_config(path).name)
        settings = load_config(path, [f"name={name}-{way}", *_overrides(config, way)])
        say(f"training '{settings.name}'")
        run = train(settings, config.out / settings.name, base=path.parent, say=say)
        folders[way] = run.folder
        scores[way] = {row["task"]: row for row in run.scores["tasks"]}
        batch = _training_batch(settings, path.parent, run, config.rows)
        found = flat_curves.measure(run.model, batch, adaptive=config.adaptive, norm=config.norm)
        curves[way] = flat_curves.plain_values(found, run.model.task_names)
    figures = {"scores": scores, "sharpness": curves}
    record = folders["flat"] / "sharpness.json"
    files.write_json(record, figures)
    lines = {way: read_lines(folder / METRICS) for way, folder in folders.items()}
    pictures = [
        flat_curves.draw(curves, folders["flat"] / "sharpness.png"),
        flat_curves.draw_training(lines, folders["flat"] / "training.png"),
    ]
    written = [folder / "report.html" for folder in folders.values()]
    return Outcome(folders["flat"], figures, _lines(scores, curves), [*written, record, *pictures])


def _overrides(config: FlatRunConfig, way: str) -> list[str]:
    """Both ways combine task gradients alike; only one of them climbs."""
    given = [
        "evaluate.single_task=false",
        "train.conflict_every=10",
        f"train.aggregator={config.aggregator}",
    ]
    if way == "flat":
        fields = ("rho", "adaptive", "norm", "ascent", "aggregation")
        chosen = ", ".join(f"{f}: {str(getattr(config, f)).lower()}" for f in fields)
        given.append(f"train.sharpness={{{chosen}}}")
    return given


def _training_batch(settings: Any, base: Path, run: Any, rows: int) -> Any:
    """Rows of the run's own mixture, encoded as the model was trained on them."""
    from dataclasses import replace

    from polytask.pipeline.prepare import prepare
    from polytask.train.distribution import Distribution

    changed = settings.train.model_copy(update={"batch_size": rows, "accumulate": 1})
    prepared = prepare(settings.model_copy(update={"train": changed, "leaks": None}), base)
    prepared = replace(prepared, processor=run.processor)
    return prepared.loader(Distribution("cpu")).batch(0)[0]


def _lines(
    scores: Mapping[str, Mapping[str, Mapping[str, Any]]], curves: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """A line per task: its test score and how much its training loss rises at .1, both ways."""
    lines = []
    for task, row in scores["flat"].items():
        parts = []
        for way in scores:
            value, rise = scores[way][task]["multitask"], curves[way][task]["rise"]["0.1"]
            shown = "-" if value is None else f"{value:.4f}"
            up = "not measured" if rise is None else f"{rise:.4f}"
            parts.append(f"{way} {shown} (rise {up})")
        lines.append(f"{task}: {row['metric']}  " + ",  ".join(parts))
    return lines
