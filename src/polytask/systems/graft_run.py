"""`polytask run skill-grafting`: the skill of one's own checkpoint, or of one made here.

With `--data my.yaml` (keys as for `polytask localize`) it is that command. Without, MiniLM's upper
layers are fine-tuned with SGD on one real task, and its skill is localized: about two minutes.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from polytask import files
from polytask.systems.base import Outcome, Say, SystemConfig


class GraftRunConfig(SystemConfig):
    """Sheet 54 on one's own models. `data`: a configuration as for `polytask localize`."""

    task: Literal["languages", "library", "diagnoses"] = "languages"
    """Without data: which task of the testbed."""
    sparsity: float = 0.01
    seed: int = 0


def graft_run(config: GraftRunConfig, say: Say) -> Outcome:
    """Localize, judge, report; see `polytask.pipeline.localize`."""
    if config.data is None:
        return _embedded(config, say)
    from polytask.pipeline.localize import load_localize_config, localize

    settings = load_localize_config(config.data)
    found = localize(settings, config.out / settings.name, config.data.parent, say)
    return _outcome(found.folder, found.to_dict())


def _embedded(config: GraftRunConfig, say: Say) -> Outcome:
    """A skill of MiniLM: fine-tune (cached), learn the mask, judge, report."""
    import torch

    from polytask.evaluate.calibration import compare_on_sets, reliability
    from polytask.merge.graft_fit import MaskConfig
    from polytask.merge.graft_map import bits_by_module
    from polytask.pipeline.localize import plain
    from polytask.report.graft_page import graft_report
    from polytask.systems.testbeds import names_grafts, names_texts

    setting = names_grafts.Setting(
        (config.task,),
        tuple(names_texts.POOL.items()),
        train=400,
        valid=200,
        steps=100,
        multitask_steps=1,
        batch=16,
        lr=0.05,
        adamw_lr=2e-4,
        mask_rows=128,
        mask=MaskConfig(steps=6, seed=config.seed),
        patch=0.25,
    )
    say(f"fine-tuning MiniLM's upper layers on '{config.task}'")
    bed = names_grafts.bed(setting, config.seed)
    tuned = bed.finetuned(config.task)
    say("learning the mask")
    graft, fitted = bed.learned(config.task, config.sparsity)
    kept = graft.sparse(fitted.mask, config.task)
    kept = replace(kept.to(torch.float16), facts={**kept.facts, "sparsity": config.sparsity})
    states: dict[str, Any] = {
        "pretrained": bed.base,
        "fine-tuned": tuned,
        "movement": graft.state(graft.movement()),
        "graft": kept.apply(bed.base),
    }
    truth = {"test": bed.labels(config.task)}
    found = {name: {"test": bed.probabilities(s, config.task)} for name, s in states.items()}
    folder = config.out / f"graft-{config.task}"
    folder.mkdir(parents=True, exist_ok=True)
    kept.save(folder / "graft.safetensors")
    diagrams = {name: asdict(reliability(p["test"], truth["test"])) for name, p in found.items()}
    figures = {
        "folder": str(folder),
        "graft": str(folder / "graft.safetensors"),
        "count": len(kept),
        "of": kept.layout.size,
        "share": kept.share,
        "scores": [asdict(s) for s in compare_on_sets(found, truth, "fine-tuned")],
        "bits": [asdict(cell) for cell in bits_by_module(kept)],
        "diagrams": {n: {k: v.tolist() for k, v in d.items()} for n, d in diagrams.items()},
        "trace": [asdict(step) for step in fitted.trace],
        "notes": list(graft.notes),
    }
    values = plain(figures)
    files.write_json(folder / "localize.json", values)
    graft_report(folder, config.task, values)
    return _outcome(folder, values)


def _outcome(folder: Path, figures: dict[str, Any]) -> Outcome:
    lines = [f"{figures['count']:,} of {figures['of']:,} parameters ({figures['share']:.3%})"]
    for row in figures["scores"]:
        lines.append(
            f"{row['model']}, {row['set']}: accuracy {row['accuracy']:.4f}, ECE {row['ece']:.4f}, "
            f"agreement {row['agreement']:.4f}"
        )
    written = [folder / name for name in ("graft.safetensors", "localize.json", "report.html")]
    return Outcome(folder, figures, lines, written)
