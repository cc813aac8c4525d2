"""19 MHR: an inventory of adapters, mixed per task and per block of features.

Caccia et al. 2023, arXiv 2211.03831. Every adapted linear layer holds S low-rank modules and a
table of logits; a task's row says how much of each module every block of features takes. Poly is
one block. The inventory is trained on many tasks; a new task gets a fresh row and tunes modules
and row (full), the row alone (z), or the average of the modules (mu).

Judged on digits seen through skills (see testbeds.skills): 40 training tasks, 10 new ones with 32
examples each, against one LoRA of the same size that all tasks share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from polytask.adapt import Adapters
from polytask.study import Arm, Budget, Claim, Evidence, Executor, Result, Size, Tuning, tune
from polytask.study.judge import judge_all
from polytask.systems import card as card_of
from polytask.systems.adapt_run import MHRRunConfig, mhr_run
from polytask.systems.base import Outcome, Say, read_tuning
from polytask.systems.testbeds import skills as bed

LRS, FEW_LRS = (1e-2, 3e-2, 1e-1), (3e-4, 1e-3)
TUNING_SEEDS = (1000, 1001)  # never judged on
LORA = {"method": "poly", "rank": 32, "modules": 1, "gate": "uniform", "alpha": 32.0}
POLY = {"method": "poly", "rank": 4, "modules": 8, "alpha": 4.0}
MHR: Mapping[str, Any] = {**POLY, "method": "mhr", "heads": 4}
SLACK = {"z": 0.03, "mu": 0.02}  # what the sheet allows these to lie below the whole


def _full(adapters: Adapters) -> None:
    adapters.reset(("new",))


def _fresh(adapters: Adapters) -> None:
    adapters.reset(("new",), keep=False)


def _rows(adapters: Adapters) -> None:
    adapters.reset(("new",))
    adapters.tune_rows_only()


def _mean(adapters: Adapters) -> None:
    adapters.to_uniform(tasks=("new",))


def _nothing(adapters: Adapters) -> None:
    adapters.reset(("new",), keep=False)
    adapters.requires_grad_(False)


@dataclass(frozen=True)
class Method:
    """Which adapters, what is tuned on a new task, and whose settings it takes."""

    options: Mapping[str, Any]
    prepare: Callable[[Adapters], None] = _full
    tuned_as: str | None = None  # takes the learning rates of that arm
    shuffled: bool = False


METHODS: Mapping[str, Method] = {
    "base": Method(LORA, _nothing, "lora"),
    "lora": Method(LORA),
    "poly": Method(POLY),
    "mhr": Method(MHR),
    "mhr-16": Method({**MHR, "heads": 16}),
    "mhr-z": Method(MHR, _rows, "mhr"),
    "mhr-mu": Method(MHR, _mean, "mhr"),
    "mhr-rand": Method(MHR, _fresh, "mhr"),
    "mhr-one-rate": Method(MHR, _full, "mhr"),
    "mhr-shuffled-tasks": Method(MHR, _full, "mhr", shuffled=True),
}


@dataclass(frozen=True)
class Trial:
    """Multitask training, then ten new tasks one by one."""

    name: str
    lr: float
    few_lr: float
    smoke: bool = False

    def __call__(self, seed: int, budget: Budget) -> Result:
        setting = bed.SMOKE if self.smoke else bed.FULL
        method = METHODS[self.name]
        options = dict(method.options)
        if self.name == "mhr-one-rate":
            options["routing_lr"] = self.lr
        place, _ = bed.prepared(setting, seed)
        start = bed.pretrained(
            setting, seed, tuple(sorted(options.items())), self.lr, method.shuffled
        )
        found = [
            bed.few_shot(place, start, task, self.few_lr, seed, method.prepare)
            for task in place.new_ids
        ]
        accuracy = sum(found) / len(found)
        metrics = {"accuracy": accuracy, "alignment": start.alignment}
        for mode, slack in SLACK.items():  # equal within a margin, as two claims of being better
            metrics[f"accuracy+{slack:g} for {mode}"] = accuracy + slack * (
                self.name == f"mhr-{mode}"
            )
            metrics[f"accuracy+{slack:g} for the whole"] = accuracy + slack * (self.name == "mhr")
        steps = setting.steps + setting.few_steps * setting.new_tasks
        rows = setting.steps * setting.batch
        rows += setting.few_steps * setting.new_tasks * setting.shots
        return Result(dict(metrics), Budget(steps=steps, rows=rows), {"by task": found})


def arm(name: str, size: Size, point: Mapping[str, float]) -> Arm:
    trial = Trial(name, point["lr"], point["few_lr"], size == "smoke")
    return Arm(name, trial, {**METHODS[name].options, **point})


class MHRSystem:
    """The card's claim, its arms, and the method on one's own tasks."""

    card = card_of("19")
    config = MHRRunConfig
    tuning_file = Path(__file__).with_name("19_mhr.tuning.json")
    notes: Mapping[str, Any] = {
        "size": "LoRA of rank 32 has the parameters of 8 modules of rank 4",
        "head": "frozen: answers are sums of the base's digit probabilities",
        "accuracy": "mean over ten new tasks, 32 examples and 100 steps each",
        "alignment": "mean cosine between gradients of the 40 training tasks, at four moments",
    }

    @property
    def claims(self) -> tuple[Claim, ...]:
        """The sheet's pass lines."""
        found = [
            Claim("mhr", "lora", "accuracy"),
            Claim("mhr", "lora", "alignment"),
            Claim("mhr-z", "base", "accuracy"),
            Claim("mhr-z", "mhr", "accuracy+0.03 for z"),
            Claim("mhr-mu", "mhr", "accuracy+0.02 for mu"),
            Claim("mhr", "mhr-mu", "accuracy+0.02 for the whole"),
        ]
        for cut in ("mhr-one-rate", "mhr-shuffled-tasks"):
            found.append(Claim("mhr", cut, "accuracy", kind="ablation"))
        return tuple(found)

    def budget(self, size: Size) -> Budget:
        """Steps of multitask training and of tuning together; all arms take the same."""
        setting = bed.FULL if size == "full" else bed.SMOKE
        return Budget(steps=setting.steps + setting.few_steps * setting.new_tasks)

    def arms(self, size: Size) -> Mapping[str, Arm]:
        """Learning rates as chosen on the tuning seeds; a smoke run takes the first."""
        first = {"lr": LRS[0], "few_lr": FEW_LRS[0]}
        chosen = {} if size == "smoke" else self.tuning.chosen
        return {
            name: arm(name, size, chosen.get(method.tuned_as or name, first))
            for name, method in METHODS.items()
        }

    @property
    def tuning(self) -> Tuning:
        """How the learning rates were chosen."""
        return read_tuning(self.tuning_file)

    def tune(self, executor: Executor) -> Tuning:
        """Six pairs of learning rates for every arm that has its own, on other seeds."""
        own = [name for name, method in METHODS.items() if method.tuned_as is None]
        found, _ = tune(
            {name: partial(arm, name, "full") for name in own},
            {"lr": LRS, "few_lr": FEW_LRS},
            TUNING_SEEDS,
            self.budget("full"),
            "accuracy",
            name=f"{self.card.key}-tuning",
            executor=executor,
        )
        return found

    def reported(self, evidence: Evidence) -> list[str]:
        """Compared but not claimed: Poly, sixteen blocks, discarded modules."""
        extra = [
            Claim("mhr", "poly", "accuracy"),
            Claim("poly", "lora", "accuracy"),
            Claim("mhr", "mhr-16", "accuracy"),
            Claim("mhr", "mhr-rand", "accuracy"),
            Claim("mhr-z", "mhr", "accuracy"),
            Claim("mhr-z", "lora", "accuracy"),
            Claim("lora", "mhr-shuffled-tasks", "accuracy"),
        ]
        judged = judge_all(extra, evidence.arms, "none", evidence.size == "full")
        return [judgement.sentence for judgement in judged]

    def run(self, config: MHRRunConfig, say: Say = print) -> Outcome:
        """On the user's tasks: one run with an inventory, and its page."""
        return mhr_run(config, say)


system = MHRSystem()
