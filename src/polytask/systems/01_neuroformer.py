"""01 Neuroformer: a generative transformer over the single spikes of a population.

Antoniades, Yu, Canzano, Wang, Smith, ICLR 2024, arXiv 2311.00136. A window of activity is a
sentence of (neuron, time) tokens, predicted one after the other from the window before, the
stimulus and behaviour; attention to the past is read as directed connectivity, few labels make it a
decoder, and what it draws is synthetic activity.

Judged on a simulated circuit of 30 neurons (excitatory and inhibitory hubs, a delay of its own for
every edge, common inputs, 12 neurons driven by speed): connectivity against the true graph and its
transpose, decoding of speed from 1 % of the labels against the same net from scratch, and generated
activity against Poisson neurons with the true rates.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polytask.infer.neuro.neuroformer import Neuroformer
from polytask.study import Arm, Budget, Claim, Evidence, Executor, Result, Size, Tuning, tune
from polytask.study.judge import judge_all
from polytask.systems import card as card_of
from polytask.systems.base import Outcome, Say, read_tuning
from polytask.systems.neuro_run import NeuroRunConfig, neuro_run
from polytask.systems.testbeds import neuro_models as bed
from polytask.systems.testbeds import neuro_scores as scores

RIVALS = ("lag 0", "lag 1", "peak", "glm")
DECODERS = ("ridge", "mlp", "gru")
MODALITIES = ("past", "+stimulus", "+behaviour", "+alignment")
# arm -> variant of the model that it trains or loads
LEARNED: Mapping[str, str] = {
    "neuroformer": "spikes",
    "shuffled past": "shuffled-past",
    "no past": "no-past",
    "pretrained": "spikes",
    "shuffled labels": "shuffled-labels",
    "scratch": "spikes",
    "joint": "joint",
    "speed only": "speed",
    **{name: name for name in MODALITIES},
}
FEW = ("pretrained", "shuffled labels", "scratch")  # finetuned on 1 % of the labels
LOADED = ("transposed", "permuted", "untrained", "poisson", "sheet .4", "sheet .25")
NAMES = (*LEARNED, *LOADED, *RIVALS, *DECODERS)
TUNED = ("neuroformer", "no past", "joint", "speed only", *FEW, *DECODERS)
LRS = (1e-3, 3e-3, 6e-3)
PRETRAIN_LR = 3e-3  # of models that are finetuned afterwards, while finetuning is tuned
OWN: Mapping[str, Mapping[str, tuple[Any, ...]]] = {"ridge": {"alpha": (1.0, 100.0, 10_000.0)}}
TUNING_SEEDS = (1000,)  # never judged on
FULL = bed.Plan()


@dataclass(frozen=True)
class Trial:
    """One arm on one seed's simulated recordings."""

    name: str
    lr: float
    pretrain_lr: float
    alpha: float = 1.0  # ridge's penalty
    plan: bed.Plan = FULL
    tuning: bool = False  # the score on validation windows alone

    def __call__(self, seed: int, budget: Budget) -> Result:
        torch.set_num_threads(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # shares lost to full blocks: small, known
            if self.name in RIVALS:
                circuit = bed.population("spikes", self.plan, seed)
                return self._result(scores.correlation_scores(circuit, self.name))
            if self.name in DECODERS:
                return self._decoder(seed)
            if self.name in FEW:
                return self._few(seed)
            if self.name in LOADED:
                return self._loaded(seed)
            return self._learned(seed)

    def _learned(self, seed: int) -> Result:
        variant, plan = LEARNED[self.name], self.plan
        neuro = bed.trained(variant, plan, seed, self.lr)
        circuit = bed.population(variant, plan, seed)
        losses, steps = bed.VARIANTS[variant][2], plan.steps_of(variant)
        labelled = steps * plan.batch if "speed" in losses else 0
        found: scores.Metrics = {"valid_score": self._valid(neuro, losses)}
        if self.tuning:
            return self._result(found, steps, labelled)
        if "id" in losses:
            found |= scores.token_losses(neuro)
        if "speed" in losses:
            found["full speed_r"] = neuro.decode("speed").r
        if self.name in ("neuroformer", "shuffled past"):
            found |= scores.connection_scores(neuro, circuit, plan)
        if self.name in ("neuroformer", *MODALITIES):
            found |= scores.activity(neuro, plan, free=self.name == "neuroformer")
        return self._result(found, steps, labelled)

    def _valid(self, neuro: Neuroformer, losses: tuple[str, ...]) -> float:
        """r of speed where it is learned, else the likelihood of the next spike."""
        if "speed" in losses:
            return neuro.decode("speed", "val").r
        held_out = neuro.score("val")
        return -0.6 * held_out["id"] - 0.4 * held_out["time"]

    def _few(self, seed: int) -> Result:
        """Finetune everything on 1 % of the train windows."""
        plan = self.plan
        neuro = bed.fresh("spikes", plan, seed)
        if self.name != "scratch":
            before = bed.trained(LEARNED[self.name], plan, seed, self.pretrain_lr)
            neuro.model.load_state_dict(before.model.state_dict())
        neuro.finetune(
            "speed",
            fraction=plan.fraction,
            steps=plan.finetune,
            batch_size=plan.batch,
            lr=self.lr,
        )
        decoded = neuro.decode("speed")
        found = {
            "speed_r": decoded.r,
            "speed_r2": decoded.r2,
            "valid_score": neuro.decode("speed", "val").r,
        }
        pretrained = 0 if self.name == "scratch" else plan.steps
        rows = min(plan.batch, len(neuro.windows.subset(plan.fraction, seed)))
        return self._result(found, pretrained, plan.finetune * rows)

    def _loaded(self, seed: int) -> Result:
        """What needs no training of its own."""
        plan = self.plan
        if self.name.startswith("sheet"):
            variant = "easy" if self.name == "sheet .4" else "weak"
            neuro = bed.trained(variant, plan, seed, self.pretrain_lr)
            circuit = bed.population(variant, plan, seed)
            found = {**scores.connection_scores(neuro, circuit, plan), **scores.token_losses(neuro)}
            for rival in ("lag 0", "lag 1"):
                found[f"{rival} auroc"] = scores.correlation_scores(circuit, rival)["auroc"]
            return self._result(found, plan.steps_of(variant))
        circuit = bed.population("spikes", plan, seed)
        if self.name == "untrained":
            neuro = bed.fresh("spikes", plan, seed)
            found = {**scores.connection_scores(neuro, circuit, plan), **scores.token_losses(neuro)}
            return self._result(found)
        neuro = bed.trained("spikes", plan, seed, self.pretrain_lr)
        if self.name == "poisson":
            return self._result(scores.poisson_activity(neuro, plan, seed))
        if self.name == "transposed":
            return self._result(scores.turned(neuro, circuit), plan.steps)
        return self._result(scores.permuted(neuro, circuit, seed), plan.steps)

    def _decoder(self, seed: int) -> Result:
        neuro = bed.fresh("spikes", self.plan, seed)
        rows = neuro.windows.subset(self.plan.fraction, seed)
        fit = {"alpha": self.alpha} if self.name == "ridge" else {"lr": self.lr}

        def reached(rows: Any, where: str) -> float:
            return scores.decoder_score(neuro, self.name, rows, where, self.plan, **fit)

        found = {
            "speed_r": reached(rows, "test"),
            "full speed_r": reached(neuro.windows.train, "test"),
            "valid_score": reached(rows, "val"),
        }
        return self._result(found, 0, self.plan.finetune * min(64, len(rows)))

    def _result(self, found: Mapping[str, Any], steps: int = 0, labelled: int = 0) -> Result:
        return Result(dict(found), Budget(steps=steps, rows=labelled))


def arm(name: str, size: Size, point: Mapping[str, Any], pretrain_lr: float) -> Arm:
    """The arm `name` at a point of the grid."""
    plan = bed.SMOKE if size == "smoke" else FULL
    trial = Trial(name=name, pretrain_lr=pretrain_lr, plan=plan, **point)
    return Arm(name, trial, {**point, "pretrain_lr": pretrain_lr})


class NeuroformerSystem:
    """The card's claim, its arms, and the method on one's own recording."""

    card = card_of("1")
    config = NeuroRunConfig
    tuning_file = Path(__file__).with_name("01_neuroformer.tuning.json")
    notes: Mapping[str, Any] = {
        "steps": "steps on spikes: none of them sees a label unless the arm says so",
        "rows": "labelled windows shown in training, repeats counted",
        "auroc": "attention averaged over layers and heads, per look (A / C)",
        "cell_r": "the sheet asks for the correlation of rates with those of a resampler that has "
        "the true rates, which is 1 by construction; judged is the correlation over (window, unit)",
        "blocks": "1 % of the spikes of current and 2 % of those of past windows found no room in "
        "their blocks; the latest were kept",
        "recordings": "600 s of the hard circuit; 'sheet .4' and 'sheet .25' are the sheet's own",
    }

    @property
    def claims(self) -> tuple[Claim, ...]:
        """The sheet's tests A, B and C with their controls."""
        labels, steps = {"rows": 0.0}, {"steps": 0.0}
        return (
            Claim("neuroformer", "transposed", "auroc", margin=0.2, equal=steps),
            Claim("neuroformer", "permuted", "auroc", margin=0.3, equal=steps),
            Claim("neuroformer", "shuffled past", "auroc", kind="ablation", equal=steps),
            Claim("neuroformer", "untrained", "auroc", kind="ablation", equal=labels),
            Claim("neuroformer", "no past", "id_ce", higher_is_better=False, kind="ablation",
                  equal=steps),
            Claim("pretrained", "scratch", "speed_r", equal=labels),
            Claim("pretrained", "shuffled labels", "speed_r", kind="ablation", equal=labels),
            Claim("neuroformer", "poisson", "f1", equal=labels),
            Claim("neuroformer", "poisson", "cell_r", equal=labels),
        )  # fmt: skip

    def budget(self, size: Size) -> Budget:
        return Budget(steps=(bed.SMOKE if size == "smoke" else FULL).steps)

    def arms(self, size: Size) -> Mapping[str, Arm]:
        """Learning rates as chosen on the tuning seed; a smoke run takes the first of the grid."""
        if size == "smoke":
            return {name: arm(name, size, {"lr": LRS[0]}, LRS[0]) for name in NAMES}
        chosen = self.tuning.chosen
        main = chosen["neuroformer"]
        return {name: arm(name, size, chosen.get(name, main), main["lr"]) for name in NAMES}

    @property
    def tuning(self) -> Tuning:
        return read_tuning(self.tuning_file)

    def tune(self, executor: Executor) -> Tuning:
        """Three learning rates for every arm that learns, by the score on validation windows:
        likelihood of spikes, or r of decoded speed. Ridge also chooses its penalty. Controls, the
        sheet's circuits and the arms with more modalities take the rate of 'neuroformer'."""
        found, _ = tune(
            {name: partial(_tuned, name) for name in TUNED},
            {"lr": LRS},
            TUNING_SEEDS,
            self.budget("full"),
            "valid_score",
            name=f"{self.card.key}-tuning",
            own=OWN,
            executor=executor,
        )
        return found

    def reported(self, evidence: Evidence) -> list[str]:
        """Compared but not claimed: rivals, decoders, modalities, joint training."""
        low = {"higher_is_better": False}
        extra = [
            *(Claim("neuroformer", name, "auroc") for name in RIVALS),
            *(Claim("pretrained", name, "speed_r") for name in DECODERS),
            *(Claim("joint", name, "full speed_r") for name in ("speed only", *DECODERS)),
            Claim("joint", "neuroformer", "id_ce", **low),  # type: ignore[arg-type]
            *(
                Claim(more, less, metric, higher_is_better=metric == "f1")
                for less, more in itertools.pairwise(MODALITIES)
                for metric in ("id_ce", "f1")
            ),
        ]
        judged = judge_all(extra, evidence.arms, "none", evidence.size == "full")
        sheet = [
            f"on the sheet's circuit, weight {name.split()[1]}: attention {_mean(evidence, name)}, "
            f"against the transposed graph {_mean(evidence, name, 'auroc transposed')}, "
            f"correlation one window back {_mean(evidence, name, 'lag 1 auroc')}"
            for name in ("sheet .4", "sheet .25")
        ]
        return [*(judgement.sentence for judgement in judged), *sheet]

    def run(self, config: NeuroRunConfig, say: Say = print) -> Outcome:
        """On the user's recording: train, decode, generate, read out, draw."""
        return neuro_run(config, say)


def _tuned(name: str, point: Mapping[str, Any]) -> Arm:
    built = arm(name, "full", point, PRETRAIN_LR)
    assert isinstance(built.run, Trial)
    return replace(built, run=replace(built.run, tuning=True))


def _mean(evidence: Evidence, arm_name: str, metric: str = "auroc") -> str:
    values = [trial.metrics[metric] for trial in evidence.arms[arm_name].trials]
    return f"{np.mean([v for v in values if v is not None]):.3f}"


system = NeuroformerSystem()
