"""`polytask run ul2`: UL2's mixture on one's own text, and what each mode then writes.

`--data` is a configuration for `polytask pretrain`. Without it a small encoder-decoder is trained
on the embedded dictionary for a few minutes, so that everything can be seen at work.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from polytask import files
from polytask.systems.base import Outcome, Say, SystemConfig

TEMPLATE = Path(__file__).with_name("33_ul2.yaml")


class UL2RunConfig(SystemConfig):
    """Sheet 33 on one's own text. `data` is a configuration for `polytask pretrain` whose
    objective is a mixture with modes."""

    steps: int | None = None  # in place of the configuration's


def ul2_run(config: UL2RunConfig, say: Say) -> Outcome:
    """Pretrain (a finished run is not trained again), and tell the losses by denoiser."""
    from polytask.errors import ConfigError
    from polytask.pipeline.pretraining import pretrain
    from polytask.pipeline.pretraining_config import load_pretrain_config

    path = config.data or _made_up(config, say)
    changed = [] if config.steps is None else [f"train.steps={config.steps}"]
    settings = load_pretrain_config(path, changed)
    modes = settings.objective.mixture(settings.model.architecture or "encdec").modes
    if not modes:
        raise ConfigError(
            f"{path}: this objective has no modes; UL2 is objective: ul2-20b (encoder-decoders), "
            "decoder, or ul2r (to go on with a finished decoder)"
        )
    run = pretrain(settings, config.out / settings.name, path.parent, say=say)
    scores = run.scores
    figures: dict[str, Any] = {key: scores[key] for key in ("before", "after", "text", "plan")}
    written = [run.report, run.folder / "loss-by-denoiser.png", run.folder / "scores.json"]
    return Outcome(run.folder, figures, _lines(scores), [p for p in written if p.is_file()])


def _lines(scores: dict[str, Any]) -> list[str]:
    found = [
        f"{name}: -log p per token of held-out text {scores['before'][name]['nll']:.3f} -> "
        f"{after['nll']:.3f}"
        for name, after in scores["after"].items()
    ]
    return [
        *found,
        "prepend a mode's token to what you ask: R to classify, S to continue, X to fill in",
    ]


def _made_up(config: UL2RunConfig, say: Say) -> Path:
    path = config.out / "ul2.yaml"
    say(f"no --data given: the embedded dictionary, as {path} says")
    files.write_text(path, TEMPLATE.read_text(encoding="utf-8"))
    return path
