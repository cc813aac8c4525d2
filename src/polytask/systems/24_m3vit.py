"""24 M3ViT: a vision transformer whose experts are chosen by token and task.

Liang, Fan, Sarkar et al., NeurIPS 2022, arXiv 2210.14793. In every second block the feed-forward
is a mixture of experts with a gate per task; each task makes a pass of its own, so tasks that
conflict may train different weights, and a request for one task runs only what its tokens chose.
Executed expert by expert, two experts in memory are enough.

Judged on garment scenes with two image labels that pull the same tokens apart (the class of the
nearer and of the farther garment), against a dense network and one task-blind gate with the same
operations per request, and against one model per task.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from polytask.data.scenes import SceneSetting
from polytask.models.experts import ExpertsConfig, RoutingRecord
from polytask.models.experts.vit import MoEViT
from polytask.models.experts.vit_flops import vit_flops
from polytask.study import Arm, Budget, Claim, Evidence, Executor, Result, Size, Tuning, tune
from polytask.study.judge import judge_all
from polytask.systems import card as card_of
from polytask.systems.base import Outcome, Say, read_tuning
from polytask.systems.m3vit_run import M3ViTRunConfig, m3vit_run
from polytask.systems.testbeds import scenes as bed
from polytask.systems.testbeds.scenes_store import store_facts

SPARSE = ExpertsConfig(count=8, k=2, mult=2.0, every=2)
EXPERTS: Mapping[str, ExpertsConfig | None] = {
    "dense": None,
    "multi-gate": SPARSE,
    "conditioned": SPARSE.model_copy(update={"router": "conditioned"}),
    "blind": SPARSE.model_copy(update={"router": "blind"}),
}
NAMES = ("single", *EXPERTS)
LRS = (1e-3, 2e-3, 4e-3)
TUNING_SEEDS = (1000,)  # never judged on
FULL = bed.Bed()
SMOKE = bed.Bed(
    train=64, valid=32, test=64, dim=32, batch=8, scene=SceneSetting(size=16, reach=12.0)
)


@dataclass(frozen=True)
class Trial:
    """One arm: train on the five tasks of the scenes, judge on fresh garments."""

    name: str
    lr: float
    single_lr: float
    smoke: bool = False

    def __call__(self, seed: int, budget: Budget) -> Result:
        torch.set_num_threads(1)
        setting, steps = (SMOKE if self.smoke else FULL), int(budget.steps or 1)
        part = bed.parts(setting, seed)
        alone = bed.single_scores(setting, seed, steps, self.single_lr)
        reference = {n: alone[f"test {n}"] for n in bed.NAMES}
        spent = {"steps": steps, "rows": steps * setting.batch}
        if self.name == "single":
            found = bed.single_scores(setting, seed, steps, self.lr)
            model = bed.build(setting, seed, None)
            metrics = {n: found[f"test {n}"] for n in bed.NAMES}
            valid = {n: found[f"valid {n}"] for n in bed.NAMES}
            notes: dict[str, Any] = {}
        else:
            model = bed.build(setting, seed, EXPERTS[self.name])
            fitted = bed.fit(
                model, part["train"], steps, setting.batch, self.lr, seed, setting.decay
            )
            metrics, valid = bed.scores(model, part["test"]), bed.scores(model, part["valid"])
            metrics |= {f"cosine {k}": sum(v) / len(v) for k, v in fitted.cosine.items()}
            notes = {"cosine": fitted.cosine, **_facts(model, part["test"], steps)}
        metrics["delta_m"] = bed.delta_m(metrics, reference)
        metrics["conflict"] = (metrics["near"] + metrics["far"]) / 2
        metrics["valid_score"] = bed.overall(valid)
        requests = {n: sum(vit_flops(model.config, n).values()) for n in bed.NAMES}
        notes["request_mflops"] = {n: round(v / 1e6, 4) for n, v in requests.items()}
        notes["parameters"] = sum(p.numel() for p in model.parameters())
        flops = sum(requests.values())
        metrics["request_share"] = max(requests.values()) / flops
        return Result(dict(metrics), Budget(**spent, flops=flops), notes)


def _facts(model: MoEViT, test: bed.Part, steps: int) -> dict[str, Any]:
    """Use of experts, and the exact checks: execution orders, memory, bytes a task loads."""
    if model.config.experts is None:
        return {}
    usage = bed.usage_of(model, test)
    return {
        "usage": usage.to_dict(),
        "order_gap": order_gap(model, test.pixels[:8]),
        "store": store_facts(model, usage, test.pixels[:64]),
    }


@torch.no_grad()
def order_gap(model: MoEViT, pixels: torch.Tensor) -> float:
    """Largest difference between expert order, token order and every expert masked."""
    model.eval()
    found = []
    for order in ("expert", "token", "dense"):
        for moe in model.sparse_layers.values():
            moe.order = order  # type: ignore[assignment]
        found.append([model.features(pixels, n, RoutingRecord()) for n in model.config.names])
    for moe in model.sparse_layers.values():
        moe.order = "expert"
    pairs = [(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True)]
    return max(float((a - b).abs().max()) for a, b in pairs)


def arm(name: str, size: Size, point: Mapping[str, Any], single_lr: float) -> Arm:
    """The arm `name` at a learning rate; `single_lr` is that of the models it is compared with."""
    trial = Trial(name, float(point["lr"]), single_lr, size == "smoke")
    experts = EXPERTS.get(name)
    params = {"experts": None if experts is None else experts.model_dump(mode="json")}
    return Arm(name, trial, {**params, **point, "single_lr": single_lr})


class M3ViTSystem:
    """The card's claim, its arms, and the method on one's own tasks."""

    card = card_of("24")
    config = M3ViTRunConfig
    tuning_file = Path(__file__).with_name("24_m3vit.tuning.json")
    notes: Mapping[str, Any] = {
        "delta_m": "mean relative gain over one dense model per task, in per cent; depth counts "
        "as an error",
        "flops": "of one request per task, added up: what an answer costs, not what training did",
        "passes": "experts run one pass per task and image; a trunk that does not know the task "
        "gives the same features to all, so one pass is run",
        "scale": "24 x 24 pixels, batch 16, 400 steps: the sheet's 32 x 32 and batch 32 made small "
        "enough for two cores",
    }

    @property
    def claims(self) -> tuple[Claim, ...]:
        """The sheet's pass lines."""
        same = {"steps": 0.0, "rows": 0.0, "flops": 0.02}
        return (
            Claim("multi-gate", "dense", "delta_m", equal=same),
            Claim("multi-gate", "blind", "delta_m", kind="ablation", equal=same),
            Claim("multi-gate", "blind", "conflict", kind="ablation", equal=same),
        )

    def budget(self, size: Size) -> Budget:
        return Budget(steps=400 if size == "full" else 3)

    def arms(self, size: Size) -> Mapping[str, Arm]:
        """Learning rates as chosen on the tuning seed; a smoke run takes the first of the grid."""
        if size == "smoke":
            return {name: arm(name, size, {"lr": LRS[0]}, LRS[0]) for name in NAMES}
        chosen = self.tuning.chosen
        return {name: arm(name, size, chosen[name], chosen["single"]["lr"]) for name in NAMES}

    @property
    def tuning(self) -> Tuning:
        return read_tuning(self.tuning_file)

    def tune(self, executor: Executor) -> Tuning:
        """Three learning rates for every arm, the best score on validation scenes."""
        found, _ = tune(
            {name: partial(arm, name, "full", single_lr=LRS[0]) for name in NAMES},
            {"lr": LRS},
            TUNING_SEEDS,
            self.budget("full"),
            "valid_score",
            name=f"{self.card.key}-tuning",
            executor=executor,
        )
        return found

    def reported(self, evidence: Evidence) -> list[str]:
        """Compared but not claimed: the conditioned router, single-task models, the gradients."""
        cosine = "cosine sparse blocks"
        extra = [
            Claim("multi-gate", "conditioned", "delta_m"),
            Claim("conditioned", "dense", "delta_m"),
            Claim("conditioned", "blind", "conflict"),
            Claim("multi-gate", "single", "conflict"),
            Claim("multi-gate", "dense", "conflict"),
            Claim("multi-gate", "dense", cosine),
            Claim("multi-gate", "blind", cosine),
            *(Claim("multi-gate", "dense", n, higher_is_better=bed.HIGHER[n]) for n in bed.NAMES),
        ]
        judged = judge_all(extra, evidence.arms, "none", evidence.size == "full")
        return [judgement.sentence for judgement in judged]

    def run(self, config: M3ViTRunConfig, say: Say = print) -> Outcome:
        """On the user's tasks: with and without experts, who uses which, what a request costs."""
        return m3vit_run(config, say)


system = M3ViTSystem()
