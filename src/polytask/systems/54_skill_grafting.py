"""54 Skill grafting: a tiny set of fine-tuned parameters carries nearly all that was learned.

Panigrahi et al. 2023, arXiv 2302.06600. theta(gamma) = theta_pre + gamma delta with a binary gamma
that is learned after fine-tuning by plain gradient descent through a sigmoid around the
coordinates that moved most; no retraining.

Judged on population E: two layers of MiniLM, SGD, three text tasks whose heads are frozen class
names. A graft of 1 % must keep 95 % of the gained accuracy, be better calibrated than the
fine-tuned model, beat the coordinates that moved most and a random mask of the same size; regions
of one multitask model must overlap little, and purging one must hurt its own task most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polytask.merge.graft import random_mask
from polytask.merge.graft_delta import overlap
from polytask.merge.graft_fit import MaskConfig
from polytask.study import Arm, Budget, Claim, Evidence, Result, Size
from polytask.study.judge import judge_all
from polytask.systems import card as card_of
from polytask.systems.base import Outcome, Say
from polytask.systems.graft_run import GraftRunConfig, graft_run
from polytask.systems.testbeds import names, names_grafts, names_texts
from polytask.systems.testbeds.names_grafts import MULTITASK, Bed

MAIN, SMALL = 0.01, 0.001
FULL = names_grafts.Setting(
    ("languages", "library", "diagnoses"),
    tuple(names_texts.POOL.items()),
    train=400,
    valid=200,
    steps=200,
    multitask_steps=300,
    batch=16,
    lr=0.05,
    adamw_lr=2e-4,
    mask_rows=256,
    mask=MaskConfig(steps=6),
    patch=0.25,
)
SMOKE = names_grafts.Setting(
    ("languages", "library"), names.SMOKE.pool, 48, 32, 3, 4, 8, 0.05, 2e-4, 32,
    MaskConfig(steps=2, step_size=9.0), 0.25,
)  # fmt: skip
LEARNED = {"graft": MAIN, "graft-0.1%": SMALL}
MOVED = {"movement": MAIN, "movement-0.01%": 1e-4, "movement-0.1%": SMALL, "movement-10%": 0.1}
LINES = {"95% of the gain": 0.95, "20% of the gain": 0.2}  # what the claims are held against


@dataclass(frozen=True)
class Trial:
    """One arm: a state for every task, judged on that task's test texts."""

    name: str
    size: Size

    def __call__(self, seed: int, budget: Budget) -> Result:
        torch.set_grad_enabled(True)
        bed = names_grafts.bed(FULL if self.size == "full" else SMOKE, seed)
        if self.name in ("multitask", "overlap 0.3"):
            return _multitask(bed, self.name)
        if self.name in LINES:
            return _line(bed, LINES[self.name])
        made = {task: self.state(bed, task) for task in bed.tasks}
        metrics, notes = _judged(bed, {task: state for task, (state, _) in made.items()})
        bits = {task: count for task, (_, count) in made.items()}
        size = bed.graft(bed.tasks[0], MAIN).size
        return Result(metrics, _spent(bed), {**notes, "bits": bits, "of": size})

    def state(self, bed: Bed, task: str) -> tuple[names.State, int]:
        """The arm's model for a task, and how many parameters differ from the base."""
        if self.name == "pretrained":
            return bed.base, 0
        if self.name in ("fine-tuned", "adamw"):
            tuned = bed.finetuned(task, "sgd" if self.name == "fine-tuned" else "adamw")
            return tuned, bed.graft(task, MAIN).size
        if self.name in LEARNED:
            graft, found = bed.learned(task, LEARNED[self.name])
            return graft.state(found.mask), found.count
        if self.name in MOVED or self.name == "adamw-movement":
            optimiser: names_grafts.Optimiser = "adamw" if self.name[0] == "a" else "sgd"
            graft = bed.graft(task, MOVED.get(self.name, MAIN), optimiser=optimiser)
            return graft.state(graft.gamma_b), int(graft.gamma_b.sum())
        graft, found = bed.learned(task, MAIN)
        if self.name == "random mask":
            mask = random_mask(graft.delta, found.count, bed.seed)
            return graft.state(mask), found.count
        if self.name == "random delta":
            delta = names_grafts.random_delta(graft, found.mask, bed.seed)
            return names_grafts.with_delta(graft, delta), found.count
        if self.name == "not rounded":
            leak = torch.sigmoid(torch.tensor(-graft.bias))
            soft = torch.where(found.mask, 1 - leak, leak)
            return graft.state(soft), graft.size
        graft, found = bed.learned(task, MAIN, signs="dropped")
        return graft.state(found.mask), found.count


def _spent(bed: Bed) -> Budget:
    """Of fine-tuning, which all grafts share; what a mask costs is in the card."""
    steps = bed.setting.steps * len(bed.tasks)
    return Budget(steps=steps, rows=steps * bed.setting.batch)


def _judged(
    bed: Bed, states: Mapping[str, names.State]
) -> tuple[dict[str, float | None], dict[str, Any]]:
    """Means over the tasks, and the tasks' own values as notes."""
    found: dict[str, dict[str, float]] = {}
    for task, state in states.items():
        diagram, accuracy, guess = bed.judge(state, task)
        _, before, _ = bed.judge(bed.base, task)
        _, after, tuned = bed.judge(bed.finetuned(task), task)
        found[task] = {
            "accuracy": accuracy,
            "ece": diagram.ece,
            "overconfidence": diagram.overconfidence,
            "agreement": float((guess == tuned).mean()),
            "kept": (accuracy - before) / (after - before) if after > before else float("nan"),
        }
    keys = next(iter(found.values())).keys()
    means = {key: sum(row[key] for row in found.values()) / len(found) for key in keys}
    return dict(means), {"tasks": {t: _finite(row) for t, row in found.items()}}


def _finite(row: Mapping[str, float]) -> dict[str, float | None]:
    return {key: value if value == value else None for key, value in row.items()}


def _line(bed: Bed, share: float) -> Result:
    """The accuracy that a share of the gain would be."""
    base = [bed.judge(bed.base, task)[1] for task in bed.tasks]
    tuned = [bed.judge(bed.finetuned(task), task)[1] for task in bed.tasks]
    line = sum(b + share * (t - b) for b, t in zip(base, tuned, strict=True)) / len(base)
    return Result({"accuracy": line}, _spent(bed))


def _multitask(bed: Bed, name: str) -> Result:
    """One model for all tasks: how regions overlap, and what purging one does to whom."""
    spent = Budget(
        steps=bed.setting.multitask_steps, rows=bed.setting.multitask_steps * bed.setting.batch
    )
    if name != "multitask":
        return Result({"overlap": 0.3, "purge_drop": 0.0}, spent)
    state, tasks = bed.finetuned(MULTITASK), bed.tasks
    regions = []
    for task in tasks:
        graft, found = bed.learned(task, MAIN, MULTITASK)
        regions.append(graft.sparse(found.mask, task))
    shared = overlap(regions)
    whole = [bed.judge(state, task)[1] for task in tasks]
    purged = [[bed.judge(region.purge(state, bed.base), t)[1] for t in tasks] for region in regions]
    alone = [[bed.judge(region.apply(bed.base), t)[1] for t in tasks] for region in regions]
    drop = torch.tensor(whole) - torch.tensor(purged)  # (region, task)
    metrics = {
        "overlap": _off(shared),
        "purge_drop": float(drop.diagonal().mean()) - _off(drop),
        "accuracy": sum(whole) / len(whole),
        "accuracy_after_own_purge": float(torch.tensor(purged).diagonal().mean()),
    }
    notes = {"overlap": shared.tolist(), "whole": whole, "purged": purged, "grafted": alone}
    return Result(dict(metrics), spent, {"tasks": list(tasks), **notes})


def _off(matrix: Tensor) -> float:
    """Mean of what is not on the diagonal."""
    outside = ~torch.eye(len(matrix), dtype=torch.bool)
    return float(matrix[outside].mean())


PLAIN = ("pretrained", "fine-tuned", "random mask", "random delta", "sign dropped", "not rounded")
NAMES = (*LEARNED, *MOVED, *PLAIN, *LINES, "adamw", "adamw-movement", "multitask", "overlap 0.3")


class SkillGrafting:
    """The card's claim, its arms, and the method on two checkpoints of one's own."""

    card = card_of("54")
    config = GraftRunConfig
    notes: Mapping[str, Any] = {
        "budget": "steps and rows are those of fine-tuning; a mask takes "
        f"{FULL.mask.steps} gradients over {FULL.mask_rows} training texts and is chosen by the "
        "accuracy on 200 validation texts",
        "size": "1 % of the 3,548,928 parameters of the two tuned layers; the paper's 0.01 % is of "
        "85 million",
    }

    @property
    def claims(self) -> tuple[Claim, ...]:
        """Grafts keep the skill, are calibrated, and it takes the right coordinates."""
        return (
            Claim("graft", "95% of the gain", "accuracy"),
            Claim("graft", "fine-tuned", "ece", higher_is_better=False),
            Claim("graft", "movement", "accuracy"),
            Claim("20% of the gain", "random mask", "accuracy"),
            Claim("multitask", "overlap 0.3", "overlap", higher_is_better=False),
            Claim("multitask", "overlap 0.3", "purge_drop"),
            Claim("graft", "sign dropped", "accuracy", kind="ablation"),
            Claim("graft", "random delta", "accuracy", kind="ablation"),
        )

    def budget(self, size: Size) -> Budget:
        return Budget(steps=FULL.steps if size == "full" else SMOKE.steps)

    def arms(self, size: Size) -> Mapping[str, Arm]:
        setting = FULL if size == "full" else SMOKE
        params = {"tasks": list(setting.tasks), "train": setting.train, "lr": setting.lr}
        return {name: Arm(name, Trial(name, size), params) for name in NAMES}

    def reported(self, evidence: Evidence) -> list[str]:
        """Compared but not claimed: smaller grafts, the dense leak, AdamW's deltas."""
        extra = [
            Claim("graft-0.1%", "movement-0.1%", "accuracy"),
            Claim("graft-0.1%", "fine-tuned", "ece", higher_is_better=False),
            Claim("not rounded", "graft", "accuracy"),
            Claim("movement", "adamw-movement", "accuracy"),
        ]
        judged = judge_all(extra, evidence.arms, "none", evidence.size == "full")
        return [judgement.sentence for judgement in judged]

    def run(self, config: GraftRunConfig, say: Say = print) -> Outcome:
        """On the user's two checkpoints; without data, on a skill of the testbed."""
        return graft_run(config, say)


system = SkillGrafting()
