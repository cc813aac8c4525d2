"""18 ScaLearn: transfer by learning how strongly the outputs of frozen task adapters count.

Frohmann et al. 2024, arXiv 2310.01217. Stage 1 trains a bottleneck adapter per task. Stage 2 runs
all of them side by side for a target and learns only omega in o = sum_s omega_s * u_s + residual:
a vector or a number per source, per layer or for all layers. No softmax, no sum-to-one.

Judged on seven tasks over MNIST digits with a small pretrained encoder, and on six text tasks over
MiniLM (see testbeds.sources): 64 labels a target, against the target's own adapter and against
AdapterFusion, which learns attention over the same sources.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from polytask.study import Arm, Budget, Claim, Evidence, Executor, Result, Size, Tuning, tune
from polytask.study.judge import judge_all
from polytask.systems import card as card_of
from polytask.systems.adapt_run import ScaLearnRunConfig, scalearn_run
from polytask.systems.base import Outcome, Say, read_tuning
from polytask.systems.testbeds import sources as bed

LRS = (1e-3, 6e-3, 2e-2, 6e-2)
TUNING_SEEDS = (1000,)  # never judged on
SCALE: Mapping[str, Any] = {"method": "scalearn"}
METHODS: Mapping[str, Mapping[str, Any] | None] = {
    "own": None,  # the target's own adapter goes on training
    "fusion": {"method": "fusion"},
    "scalearn": SCALE,
    "uniform": {**SCALE, "variant": "uniform"},
    "scalearn++": {**SCALE, "variant": "scalearn++"},
    "uniform++": {**SCALE, "variant": "uniform++"},
    "mean": {**SCALE, "normalise": "mean"},
    "softmax": {**SCALE, "normalise": "softmax"},
    "shuffled": SCALE,  # sources at the wrong layer
    "untrained": SCALE,  # sources that have learned nothing
}
ON_TEXTS = ("own", "fusion", "scalearn", "uniform", "untrained")
NAMES = (*(f"glyphs-{n}" for n in METHODS), *(f"texts-{n}" for n in ON_TEXTS))
SLACK = 0.005  # what the sheet allows ScaLearn to lie below AdapterFusion


@dataclass(frozen=True)
class Trial:
    """Every task in turn is the target."""

    name: str
    lr: float
    smoke: bool = False

    def __call__(self, seed: int, budget: Budget) -> Result:
        kind, _, method = self.name.partition("-")
        full = {"glyphs": bed.GLYPHS, "texts": bed.TEXTS}
        setting = bed.SMOKE[kind] if self.smoke else full[kind]
        place = bed.bed(setting, seed)
        rich, _ = bed.adapters_of(setting, seed)
        options = METHODS[method]
        bank = None if options is None else rich
        if method == "shuffled":
            bank = bed.shuffled(rich, seed)
        if method == "untrained":
            bank = bed.untrained(rich, seed)
        found = {
            target: bed.stage2(place, target, bank, options or {}, self.lr, seed)
            for target in setting.tasks
        }
        accuracy = sum(s.test for s in found.values()) / len(found)
        metrics = {
            "accuracy": accuracy,
            "accuracy+0.005": accuracy + SLACK * (method == "scalearn"),
            "valid_accuracy": sum(s.valid for s in found.values()) / len(found),
        }
        steps = setting.stage2 * len(found)
        notes = {
            "learned": next(iter(found.values())).learned,
            "by target": {target: s.test for target, s in found.items()},
        }
        return Result(dict(metrics), Budget(steps=steps, rows=steps * setting.batch), notes)


def arm(name: str, size: Size, point: Mapping[str, float]) -> Arm:
    return Arm(name, Trial(name, point["lr"], size == "smoke"), {"arm": name, **point})


class ScaLearnSystem:
    """The card's claim, its arms, and the method on one's own tasks."""

    card = card_of("18")
    config = ScaLearnRunConfig
    tuning_file = Path(__file__).with_name("18_scalearn.tuning.json")
    notes: Mapping[str, Any] = {
        "targets": "each task in turn with 64 labels; its own adapter has seen only these",
        "budget": "steps and rows of stage 2; stage 1 is the same for all arms of a seed",
        "texts": "MiniLM with an adapter at its last layer: forms that share scales over layers "
        "are the same as those that do not, so they are not listed",
        "tuning": "learning rate of stage 2, four values for every arm, by validation accuracy",
    }

    @property
    def claims(self) -> tuple[Claim, ...]:
        """The sheet's pass lines, on both encoders."""
        found = []
        for kind in ("glyphs", "texts"):
            scale = f"{kind}-scalearn"
            found.append(Claim(scale, f"{kind}-own", "accuracy"))
            found.append(Claim(scale, f"{kind}-fusion", "accuracy+0.005"))
            found.append(Claim(scale, f"{kind}-untrained", "accuracy", kind="ablation"))
        found.append(Claim("glyphs-scalearn", "glyphs-shuffled", "accuracy", kind="ablation"))
        return tuple(found)

    def budget(self, size: Size) -> Budget:
        """Steps of stage 2 over all targets of the first encoder."""
        setting = bed.GLYPHS if size == "full" else bed.SMOKE["glyphs"]
        return Budget(steps=setting.stage2 * len(setting.tasks))

    def arms(self, size: Size) -> Mapping[str, Arm]:
        """Learning rates as chosen on the tuning seed; a smoke run takes the middle one."""
        chosen = {} if size == "smoke" else self.tuning.chosen
        return {name: arm(name, size, chosen.get(name, {"lr": LRS[1]})) for name in NAMES}

    @property
    def tuning(self) -> Tuning:
        """How the learning rates were chosen."""
        return read_tuning(self.tuning_file)

    def tune(self, executor: Executor) -> Tuning:
        """Four learning rates for every arm, the best mean validation accuracy."""
        found, _ = tune(
            {name: partial(arm, name, "full") for name in NAMES},
            {"lr": LRS},
            TUNING_SEEDS,
            self.budget("full"),
            "valid_accuracy",
            name=f"{self.card.key}-tuning",
            executor=executor,
        )
        return found

    def reported(self, evidence: Evidence) -> list[str]:
        """Compared but not claimed: the other forms, and the paper's normalised ablations."""
        others = ("uniform", "scalearn++", "uniform++", "mean", "softmax")
        extra = [Claim("glyphs-scalearn", f"glyphs-{n}", "accuracy") for n in others]
        extra += [Claim("texts-scalearn", "texts-uniform", "accuracy")]
        extra += [Claim(f"{k}-scalearn", f"{k}-fusion", "accuracy") for k in ("glyphs", "texts")]
        extra += [Claim(f"{k}-fusion", f"{k}-own", "accuracy") for k in ("glyphs", "texts")]
        judged = judge_all(extra, evidence.arms, "none", evidence.size == "full")
        return [judgement.sentence for judgement in judged]

    def run(self, config: ScaLearnRunConfig, say: Say = print) -> Outcome:
        """On the user's tasks: stage 1 on all, stage 2 for one, and what its scales say."""
        return scalearn_run(config, say)


system = ScaLearnSystem()
