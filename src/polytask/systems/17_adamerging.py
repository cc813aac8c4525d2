"""17 AdaMerging: learn, without labels, how much of each expert goes into each tensor of a merge.

Yang et al. 2024, arXiv 2310.02575. Coefficients of task vectors, one a task or one a tensor and
task, are trained by Adam to lower the entropy of the merged model's predictions on unlabelled
inputs of all tasks; weights and heads stay as they are. The ++ form trims task vectors first.

Judged on experts of MiniLM for six text tasks with class names as heads (population E), against
task arithmetic at the paper's 0.3 and against the same form with one coefficient a task. What task
arithmetic and TIES reach with a scale tuned on labels is reported beside it: who has no labels
cannot tune, but a reader wants to know the gap.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from polytask import rng
from polytask.merge.adamerging import AdaMerged, AdaMergingConfig, fit, trust
from polytask.merge.vectors import TaskVectors
from polytask.objectives.classes import entropy
from polytask.study import Arm, Budget, Claim, Evidence, Result, Size
from polytask.study.judge import judge_all
from polytask.systems import card as card_of
from polytask.systems.adamerging_run import AdaMergingRunConfig, adamerging_run
from polytask.systems.base import Outcome, Say
from polytask.systems.testbeds import names as bed
from polytask.systems.testbeds import names_merges as merges

STEPS, BATCH, LR = (
    60,
    8,
    1e-2,
)  # unlabelled texts of each task in a step; the paper's 1e-3 is for 500 steps
INIT = 0.3
FREE = Budget(steps=0, rows=0, calls=0)
Change = Literal["", "sign", "heads", "places", "half"]


@dataclass(frozen=True)
class Learned:
    """AdaMerging, or AdaMerging with one thing changed.

    change: 'sign' raises the entropy; 'heads' gives every task the head of the next; 'places'
    hands the learned coefficients to other tensors of the same task; 'half' adapts on texts that
    are not judged.
    """

    granularity: Literal["task", "tensor"] = "tensor"
    trim: float | None = None
    change: Change = ""
    smoke: bool = False

    def __call__(self, seed: int, budget: Budget) -> Result:
        found = bed.population(seed, self.smoke)
        steps = int(budget.steps or 1)
        learned = self._fit(found, steps)
        state: bed.State = learned.state
        if self.change == "places":
            state = elsewhere(found, learned.coefficients, seed)
        rows = list(learned.coefficients.values())
        notes = {
            "coefficients": {k: [round(float(c), 4) for c in r] for k, r in zip(found.base, rows)},
            "entropy": [round(sum(v[i] for v in learned.trace.values()), 4) for i in range(steps)],
            "warnings": list(learned.warnings),
        }
        metrics = merges.report(found, state)
        metrics["coefficient"] = float(torch.stack(rows).mean())
        return Result(metrics, Budget(steps=steps, rows=learned.rows, calls=0), notes)

    def _fit(self, found: bed.Population, steps: int) -> AdaMerged:
        part = "unlabelled" if self.change == "half" else "test"
        tasks = list(found.tasks)
        heads = dict(found.heads)
        if self.change == "heads":
            heads = {t: found.heads[tasks[(i + 1) % len(tasks)]] for i, t in enumerate(tasks)}
        return fit(
            found.model,
            found.base,
            found.experts,
            heads,
            {task: merges.Unlabelled(found, task, part, BATCH) for task in tasks},
            AdaMergingConfig(
                granularity=self.granularity,
                init=INIT,
                lr=LR,
                steps=steps,
                batches_per_step=1,
                trim=self.trim,
            ),
            loss=_raised if self.change == "sign" else entropy,
        )


def _raised(logits: Tensor) -> Tensor:
    return -entropy(logits)


def elsewhere(found: bed.Population, coefficients: Mapping[str, Tensor], seed: int) -> bed.State:
    """The merge with every task's coefficients dealt to the tensors in a random order."""
    keys = list(coefficients)
    matrix = torch.stack([coefficients[key] for key in keys])  # (tensors, K)
    for k in range(matrix.shape[1]):
        order = rng.generator(seed, "places", k).permutation(len(keys))
        matrix[:, k] = matrix[torch.from_numpy(order), k]
    vectors = TaskVectors.from_state_dicts(found.base, list(found.experts.values()))
    return vectors.add(dict(zip(keys, matrix, strict=True)))


@dataclass(frozen=True)
class Fixed:
    """What AdaMerging is compared with: base, experts, and merges along one direction."""

    name: str
    smoke: bool = False

    def __call__(self, seed: int, budget: Budget) -> Result:
        found = bed.population(seed, self.smoke)
        if self.name == "base":
            return Result(merges.report(found, found.base), FREE)
        if self.name == "experts":
            own = {task: found.accuracy(found.experts[task], task) for task in found.tasks}
            mean = sum(own.values()) / len(own)
            each = {f"accuracy {task}": value for task, value in own.items()}
            return Result({"accuracy": mean, **each}, FREE)
        ties = self.name == "ties-tuned"
        params = merges.PAPER_TIES if ties else {}
        along = merges.direction(found, "ties" if ties else "task_arithmetic", **params)
        if self.name == "average":
            state = merges.moved(found, along, 1 / len(found.tasks))
            return Result(merges.report(found, state), FREE)
        if self.name == "arithmetic-0.3":
            state = merges.moved(found, along, INIT)
            metrics = merges.report(found, state)
            logits = {task: found.all_logits(state, task) for task in found.tasks}
            labels = {task: found.tasks[task].parts["test"].label for task in found.tasks}
            metrics["trust"] = trust(logits, labels)
            return Result(metrics, FREE)
        scales = (merges.MEANS if ties else merges.SUMS)[: 2 if self.smoke else None]
        metrics, notes = merges.tuned(found, along, scales)
        return Result(metrics, Budget(steps=0, rows=0, calls=len(scales)), notes)


FIXED = ("base", "experts", "average", "arithmetic-0.3", "arithmetic-tuned", "ties-tuned")
LEARNED: Mapping[str, dict[str, Any]] = {
    "task-wise": {"granularity": "task"},
    "tensor-wise": {},
    "tensor-wise++": {"trim": 0.2},
    "other-half": {"change": "half"},
    "maximised": {"change": "sign"},
    "wrong-heads": {"change": "heads"},
    "wrong-places": {"change": "places"},
}


class AdaMergingSystem:
    """The card's claim, its arms, and the method on one's own checkpoints."""

    card = card_of("17")
    config = AdaMergingRunConfig
    notes: Mapping[str, Any] = {
        "texts": "coefficients are learned on the texts that are judged, without their labels, as "
        "in the paper; 'other-half' learns on others",
        "budget": "steps and rows are those of adaptation, on unlabelled texts; fixed merges take "
        "none. calls are scorings of a merge on labelled texts: none but for the tuned ones",
        "tuning": "arithmetic-tuned and ties-tuned: the best of ten scales on 100 labelled texts a "
        "task; AdaMerging sees no label and is not tuned",
        "lr": "1e-2, after a pilot of the specification; the paper's 1e-3 is for 500 steps",
    }

    @property
    def claims(self) -> tuple[Claim, ...]:
        """Better than what it starts from, than one coefficient a task, and than its ablations."""
        same = {"steps": 0.0, "rows": 0.0}
        cut: dict[str, Any] = {"kind": "ablation", "equal": same}
        return (
            Claim("tensor-wise", "arithmetic-0.3", "accuracy", equal={"calls": 0.0}),
            Claim("tensor-wise", "task-wise", "accuracy", equal=same),
            Claim("tensor-wise", "maximised", "accuracy", **cut),
            Claim("tensor-wise", "wrong-heads", "accuracy", **cut),
            Claim("tensor-wise", "wrong-places", "accuracy", **cut),
        )

    def budget(self, size: Size) -> Budget:
        """Steps of adaptation, 8 texts of each task in each."""
        return Budget(steps=STEPS if size == "full" else 2)

    def arms(self, size: Size) -> Mapping[str, Arm]:
        smoke = size == "smoke"
        found = {name: Arm(name, Fixed(name, smoke), {"arm": name}) for name in FIXED}
        for name, options in LEARNED.items():
            found[name] = Arm(name, Learned(**options, smoke=smoke), {"arm": name, **options})
        return found

    def reported(self, evidence: Evidence) -> list[str]:
        """Preconditions, then what is compared but not claimed."""
        extra = [
            Claim(better, than, "accuracy", equal={})
            for better, than in (
                ("tensor-wise", "arithmetic-tuned"),
                ("tensor-wise", "ties-tuned"),
                ("tensor-wise++", "tensor-wise"),
                ("other-half", "tensor-wise"),
                ("other-half", "arithmetic-0.3"),
            )
        ]
        judged = judge_all(extra, evidence.arms, "none", evidence.size == "full")
        first = merges.preconditions(evidence) if evidence.size == "full" else []
        return [*first, *(judgement.sentence for judgement in judged)]

    def run(self, config: AdaMergingRunConfig, say: Say = print) -> Outcome:
        """On the user's checkpoints and unlabelled inputs."""
        return adamerging_run(config, say)


system = AdaMergingSystem()
