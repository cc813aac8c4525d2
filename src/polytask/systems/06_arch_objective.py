"""06 Arch-Objective: which architecture and objective to pretrain, and how to change one's mind.

Wang, Roberts et al. 2022, arXiv 2204.05832. One transformer is a causal decoder, a prefix decoder
or (with an encoder) an encoder-decoder by its attention mask, and three objectives are transforms
of text; six cells are trained on the same number of tokens seen, then finetuned on tasks. A trained
decoder changes architecture by a switch of its mask: a causal one continued on span corruption
(NC-A), or a prefix one continued on full language modelling (LM-A), learns its new objective in a
fraction of the tokens that training from scratch takes.

Judged on Webster's dictionary: the adaptations, with the mask left unswitched and with all blocks
made anew as ablations. The grid after finetuning is reported with a verdict of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from polytask.study import Arm, Budget, Claim, Evidence, Executor, Result, Size, Tuning, tune
from polytask.study.judge import judge_all
from polytask.systems import arch_cells as cells
from polytask.systems import card as card_of
from polytask.systems.arch_run import ArchRunConfig, arch_run
from polytask.systems.base import Outcome, Say, read_tuning
from polytask.systems.testbeds import architectures as bed
from polytask.systems.testbeds.prose import Part


@dataclass(frozen=True)
class Adaptation:
    """A pretrained cell continued on another objective, perhaps under another mask."""

    base: str
    to: str  # the cell it becomes
    switched: bool = True  # the mask is
    anew: bool = False  # blocks and norms start again, embeddings stay


ADAPTATIONS = {
    "nc-a": Adaptation("cd:flm", "nd:mlm"),
    "nc-a unswitched": Adaptation("cd:flm", "cd:mlm", switched=False),
    "nc-a anew": Adaptation("cd:flm", "nd:mlm", anew=True),
    "lm-a": Adaptation("nd:mlm", "cd:flm"),
    "lm-a anew": Adaptation("nd:mlm", "cd:flm", anew=True),
}
NAMES = (*cells.CELLS, *ADAPTATIONS)
SCRATCH = {"mlm": "nd:mlm", "flm": "cd:flm"}  # what an adaptation is measured against
LRS = (3e-3, 6e-3, 1.2e-2)
TUNING_SEEDS = (1000,)  # never judged on


@dataclass(frozen=True)
class Trial:
    """One arm: a cell from scratch, then tasks; or an adaptation of a cell."""

    name: str
    lr: float
    rates: tuple[tuple[str, float], ...]  # cell -> the rate it is pretrained with
    smoke: bool = False
    tuning: bool = False  # held-out text of the validation part, and no tasks

    def __call__(self, seed: int, budget: Budget) -> Result:
        torch.set_num_threads(1)
        setting = bed.SMOKE if self.smoke else bed.FULL
        part: Part = "valid" if self.tuning else "test"
        if self.name in ADAPTATIONS:
            return self._adapt(setting, seed, part)
        return self._cell(setting, seed, part)

    def _cell(self, setting: bed.Bed, seed: int, part: Part) -> Result:
        objective = self.name.partition(":")[2]
        model, curve, spent = bed.pretrained(setting, self.name, seed, self.lr, part)
        early = setting.adapt * setting.scale.step_tokens
        metrics: dict[str, float | None] = {
            f"{objective} loss": curve.at(early),
            f"{objective} loss at the end": curve.loss[-1],
            f"{objective} text loss at the end": curve.text[-1],
            f"{objective} speed-up": 1.0,
            "tuned": curve.loss[-1],
        }
        notes: dict[str, Any] = {"curve": vars(curve), "spent": spent}
        notes["parameters"] = cells.parameters(model)
        total = {n: spent[n] for n in ("steps", "tokens", "rows")}
        if not self.tuning:
            scores, done = bed.finetuned(setting, model, seed, part)
            metrics["tasks"] = scores.mean
            metrics |= {f"tasks {name}": value for name, value in scores.by_set.items()}
            notes["by phrasing"] = scores.by_prompt
            notes["chance"] = scores.chance
            notes["tasks spent"] = bed.spent_of(done)
            total = {n: total[n] + bed.spent_of(done)[n] for n in total}
        return Result(metrics, Budget(**total), notes)

    def _adapt(self, setting: bed.Bed, seed: int, part: Part) -> Result:
        way, rates = ADAPTATIONS[self.name], dict(self.rates)
        text, scale = bed.text_of(setting), setting.scale
        objective = cells.Cell.of(way.to).objective
        model, _, before = bed.pretrained(setting, way.base, seed, rates[way.base], part)
        if way.switched:
            model = cells.switched(model, "prefix" if way.to.startswith("nd") else "causal")
        if way.anew:
            model = cells.rebuilt(model, seed)
        curve, done = cells.train(
            model, text, objective, scale, seed, setting.adapt, self.lr, part=part
        )
        metrics: dict[str, float | None] = {
            f"{objective} loss": curve.loss[-1],
            f"{objective} text loss": curve.text[-1],
            "tuned": curve.loss[-1],
        }
        notes: dict[str, Any] = {"curve": vars(curve), "before": before}
        if not self.tuning:
            rival = SCRATCH[objective]
            _, scratch, _ = bed.pretrained(setting, rival, seed, rates[rival], part)
            factor, reached = cells.speed_up(curve, scratch)
            metrics[f"{objective} speed-up"] = factor
            notes["scratch got there"] = reached
        total = {n: bed.spent_of(done)[n] for n in ("steps", "tokens", "rows")}
        return Result(metrics, Budget(**total), notes)


def arm(
    name: str,
    size: Size,
    point: Mapping[str, Any],
    rates: Mapping[str, float],
    tuning: bool = False,
) -> Arm:
    """The arm `name` at a learning rate; `rates` are those of the cells it builds on."""
    used = tuple(sorted((cell, float(lr)) for cell, lr in rates.items()))
    trial = Trial(name, float(point["lr"]), used, size == "smoke", tuning)
    params: dict[str, Any] = {**point, "rates": dict(used)}
    if name in ADAPTATIONS:
        params |= vars(ADAPTATIONS[name])
    return Arm(name, trial, params)


class ArchObjectiveSystem:
    """The card's claim, its arms, and the study on one's own text."""

    card = card_of("06")
    config = ArchRunConfig
    tuning_file = Path(__file__).with_name("06_arch_objective.tuning.json")
    notes: Mapping[str, Any] = {
        "loss": "held-out nats per target token, sentinels and ends of span corruption included; "
        "of a cell from scratch after as many tokens as the adaptations got",
        "speed-up": "tokens that training from scratch needs to reach the adaptation's last loss, "
        "over the adaptation's tokens, interpolated; where scratch never gets there (notes), all "
        "that it was given: a lower bound",
        "budget": "tokens seen. The model that is adapted is there already: what it cost is in "
        "the notes and not counted, as in the paper",
        "scale": "the sheet's small size: width 64, 2 layers (2 + 2), vocabulary 1,024, steps of "
        "1,024 tokens, 500 of pretraining and 125 of adaptation; AdamW for Adafactor",
        "tasks": "after pretraining, every cell is finetuned on the same pairs of three tasks; "
        "accuracy by summed log-likelihood, median over phrasings, mean over tasks",
    }

    @property
    def claims(self) -> tuple[Claim, ...]:
        """The sheet's pass lines, for both directions."""
        found = []
        for way, rival, objective in (("nc-a", "nd:mlm", "mlm"), ("lm-a", "cd:flm", "flm")):
            more: dict[str, Any] = {"equal": {"tokens": 0.01}, "than_may_spend_more": True}
            found += [
                Claim(way, rival, f"{objective} loss", higher_is_better=False, **more),
                Claim(way, rival, f"{objective} speed-up", margin=0.3, **more),
            ]
        for ablation, objective in (
            ("nc-a unswitched", "mlm"),
            ("nc-a anew", "mlm"),
            ("lm-a anew", "flm"),
        ):
            way, metric = ablation.split()[0], f"{objective} loss"
            found.append(Claim(way, ablation, metric, higher_is_better=False, kind="ablation"))
        return tuple(found)

    def budget(self, size: Size) -> Budget:
        setting = bed.FULL if size == "full" else bed.SMOKE
        return Budget(tokens=setting.steps * setting.scale.step_tokens)

    def arms(self, size: Size) -> Mapping[str, Arm]:
        """Learning rates as chosen on the tuning seed; a smoke run takes the middle of the grid."""
        if size == "smoke":
            rates = dict.fromkeys(cells.CELLS, LRS[1])
            return {name: arm(name, size, {"lr": LRS[1]}, rates) for name in NAMES}
        chosen = self.tuning.chosen
        rates = {cell: float(chosen[cell]["lr"]) for cell in cells.CELLS}
        return {name: arm(name, size, chosen[name], rates) for name in NAMES}

    @property
    def tuning(self) -> Tuning:
        return read_tuning(self.tuning_file)

    def tune(self, executor: Executor) -> Tuning:
        """Three learning rates for every arm by held-out loss at its end; what is adapted was
        pretrained with the middle one."""
        rates = dict.fromkeys(cells.CELLS, LRS[1])
        found, _ = tune(
            {name: partial(arm, name, "full", rates=rates, tuning=True) for name in NAMES},
            {"lr": LRS},
            TUNING_SEEDS,
            self.budget("full"),
            "tuned",
            name=f"{self.card.key}-tuning",
            higher_is_better=False,
            executor=executor,
        )
        return found

    def reported(self, evidence: Evidence) -> list[str]:
        """The grid after finetuning: the sheet's line is that span corruption with a view of the
        whole input (nd or ed) beats causal span corruption. Holm's correction over the two."""
        judged = evidence.size == "full"
        line = [Claim(name, "cd:mlm", "tasks") for name in ("nd:mlm", "ed:mlm")]
        grid = judge_all(line, evidence.arms, "holm", judged)
        rest = [Claim("cd:flm", name, "tasks") for name in ("nd:plm", "ed:plm", "nd:mlm", "ed:mlm")]
        others = judge_all(rest, evidence.arms, "none", judged)
        passed = any(judgement.verdict == "shown" for judgement in grid)
        told = "shown" if passed else "not shown"
        head = f"grid after finetuning, span corruption that sees its whole input wins: {told}"
        return [head, *(j.sentence for j in (*grid, *others))]

    def run(self, config: ArchRunConfig, say: Say = print) -> Outcome:
        """On the user's text: the grid, the adaptations, a table and a picture."""
        return arch_run(config, say)


system = ArchObjectiveSystem()
