"""Merges of population E, each along a direction whose one scale is tuned as the others' are.

A direction is what a method adds to the base at scale 1; task arithmetic, TIES and PCB-Merging are
all base + scale * direction, so that a merge is computed once and its scale chosen from a grid of
as many values for each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polytask.merge.method import merge_state_dicts
from polytask.objectives.classes import entropy
from polytask.study import Evidence
from polytask.systems.testbeds.names import Population, State

SUMS = tuple(round(0.1 * i, 1) for i in range(1, 11))  # scales of a sum of task vectors
MEANS = tuple(round(0.4 + 0.2 * i, 1) for i in range(10))  # scales of a mean of those that agree
TUNING_TEXTS = 100  # labelled texts of each task that scales are chosen on


def direction(bed: Population, method: str, **params: Any) -> dict[str, Tensor]:
    """Merged minus base, of all experts at weight 1."""
    experts, names = list(bed.experts.values()), list(bed.experts)
    merged = merge_state_dicts(method, experts, bed.base, names=names, weight=1.0, **params)
    return {key: value - bed.base[key] for key, value in merged.items()}


def moved(bed: Population, along: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """base + scale * direction."""
    return {key: value + scale * along[key] for key, value in bed.base.items()}


@dataclass(frozen=True)
class Point:
    """One scale on the labelled validation texts: mean accuracy and mean entropy over tasks."""

    scale: float
    accuracy: float
    entropy: float


def path(bed: Population, along: Mapping[str, Tensor], scales: Sequence[float]) -> list[Point]:
    """Accuracy and entropy at every scale."""
    return [Point(scale, *judge(bed, moved(bed, along, scale))) for scale in scales]


def judge(bed: Population, state: State, texts: int = TUNING_TEXTS) -> tuple[float, float]:
    """Mean over tasks of accuracy and entropy on the first validation texts."""
    right, unsure = [], []
    for name in bed.tasks:
        part = bed.tasks[name].parts["valid"]
        chosen = part.take(torch.arange(min(texts, len(part))))
        with torch.no_grad():
            logits = bed.logits(state, name, chosen.inputs())
        right.append(float((logits.argmax(1) == chosen.label).float().mean()))
        unsure.append(float(entropy(logits).mean()))
    return sum(right) / len(right), sum(unsure) / len(unsure)


def best(points: Sequence[Point]) -> Point:
    """The most accurate; of equals the first."""
    return max(points, key=lambda point: point.accuracy)


PAPER_TIES: dict[str, Any] = {
    "density": 0.2,
    "trim": "model",
    "vote": {"draw": "majority", "divide": "counts"},
}  # TIES as its paper's code has it


def tuned(
    bed: Population, along: Mapping[str, Tensor], scales: Sequence[float]
) -> tuple[dict[str, float | None], dict[str, Any]]:
    """Metrics of the merge whose scale was best on validation texts, and the path as notes."""
    points = path(bed, along, scales)
    chosen = best(points)
    metrics = report(bed, moved(bed, along, chosen.scale))
    metrics |= {"scale": chosen.scale, "trust over scales": agreement(points)}
    return metrics, {"path": [vars(point) for point in points]}


class Unlabelled:
    """Endless batches of a part's inputs, for AdaMerging."""

    def __init__(self, bed: Population, task: str, part: str, size: int) -> None:
        self.bed, self.task, self.part, self.size = bed, task, part, size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        data = self.bed.tasks[self.task].parts[self.part]
        for index in self.bed.batches(self.task, self.part, self.size, "unlabelled"):
            yield data.inputs(index)


def report(bed: Population, state: State) -> dict[str, float | None]:
    """Metrics of an arm: 'accuracy' (mean over tasks, test texts) and one for each task."""
    found = bed.accuracies(state)
    metrics: dict[str, float | None] = {"accuracy": sum(found.values()) / len(found)}
    return metrics | {f"accuracy {task}": value for task, value in found.items()}


def agreement(points: Sequence[Point]) -> float:
    """Spearman's rank correlation of entropy and error along a path of scales; NaN where one of
    them does not change."""
    from scipy.stats import spearmanr

    unsure, right = [p.entropy for p in points], [p.accuracy for p in points]
    if min(len(set(unsure)), len(set(right))) < 2:
        return float("nan")
    return float(spearmanr(unsure, [-value for value in right]).statistic)


def preconditions(evidence: Evidence) -> list[str]:
    """What must hold before a merge of a population can say anything, and whether it does."""

    def mean(arm: str, metric: str = "accuracy") -> float:
        values = [v for v in evidence.arms[arm].values(metric) if v is not None]
        return sum(values) / len(values) if values else float("nan")

    base, experts = mean("base"), mean("experts")
    tuned, scale = mean("arithmetic-tuned"), mean("arithmetic-tuned", "scale")
    way = (tuned - base) / (experts - base) if experts > base else float("nan")
    single, scales = mean("arithmetic-0.3", "trust"), mean("arithmetic-tuned", "trust over scales")

    def line(what: str, value: float, wanted: str, met: bool) -> str:
        return f"Precondition: {what} {value:.3f} (wanted {wanted}): {'met' if met else 'not met'}"

    return [
        line("accuracy of the base", base, ".45 to .60", 0.45 <= base <= 0.6),
        line("accuracy of the experts", experts, "above .90", experts > 0.9),
        line("best single scale", scale, ".2 to .5", 0.2 <= scale <= 0.5),
        line("share of the way to the experts", way, ".65 or more", way >= 0.65),
        line("rank correlation of entropy and error over scales", scales, "above .6", scales > 0.6),
        line("the same over single texts at .3", single, "above .6", single > 0.6),
    ]
