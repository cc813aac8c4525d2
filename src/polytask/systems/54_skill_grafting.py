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

from polytask.merge.graft import random_mask
from polytask.merge.graft_fit import MaskConfig
from polytask.study import Arm, Budget, Claim, Evidence, Result, Size
from polytask.study.judge import judge_all
from polytask.systems import card as card_of
from polytask.systems.base import Outcome, Say
from polytask.systems.graft_run import GraftRunConfig, graft_run
from polytask.systems.testbeds import names, names_grafts, names_texts
from polytask.systems.testbeds.names_grafts import Bed

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
        metrics, rows = bed.scores({task: state for task, (state, _) in made.items()})
        bits = {task: count for task, (_, count) in made.items()}
        size = bed.graft(bed.tasks[0], MAIN).size
        return Result(dict(metrics), _spent(bed), {"tasks": rows, "bits": bits, "of": size})

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


def _line(bed: Bed, share: float) -> Result:
    """The accuracy that a share of the gain would be."""
    ends = [
        [names_grafts.judged(bed.setting, bed.seed, task, model)[1] for task in bed.tasks]
        for model in ("pretrained", "fine-tuned")
    ]
    line = sum(b + share * (t - b) for b, t in zip(*ends, strict=True)) / len(bed.tasks)
    return Result({"accuracy": line}, _spent(bed))


def _multitask(bed: Bed, name: str) -> Result:
    """One model for all tasks: how regions overlap, and what purging one does to whom."""
    steps = bed.setting.multitask_steps
    spent = Budget(steps=steps, rows=steps * bed.setting.batch)
    if name != "multitask":
        return Result({"overlap": 0.3, "purge_drop": 0.0}, spent)
    found = names_grafts.regions(bed, MAIN)
    metrics = {
        "overlap": names_grafts.off_diagonal(found.overlap),
        "purge_drop": float(found.drop.diagonal().mean()) - names_grafts.off_diagonal(found.drop),
        "accuracy": float(found.whole.mean()),
        "accuracy_after_own_purge": float(found.purged.diagonal().mean()),
    }
    return Result(dict(metrics), spent, {"tasks": list(bed.tasks), **found.to_dict()})


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
