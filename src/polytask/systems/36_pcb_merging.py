"""36 PCB-Merging: parameters of different tasks compete, the weak and the contrary are dropped.

Du et al. 2024, arXiv 2410.02396. A parameter's score is its strength within its task vector times
its agreement with the other tasks; all but the top scores are dropped, the rest are the weights of
an average of task vectors. No data are needed but for one scale.

Judged on experts of MiniLM for six text tasks (population E), against task arithmetic, TIES and
plain averaging, with the one scale of each method chosen from ten values on the same labelled
validation texts; each part of the score taken out in turn, and then a planted signal whose answer
is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from polytask.merge.search import search_weights
from polytask.study import Arm, Budget, Claim, Evidence, Result, Size
from polytask.study.judge import judge_all
from polytask.systems import card as card_of
from polytask.systems.base import Outcome, Say
from polytask.systems.pcb_run import PCBRunConfig, pcb_run
from polytask.systems.testbeds import names as bed
from polytask.systems.testbeds import names_merges as merges
from polytask.systems.testbeds import planted

RATIO = 0.1  # of a task's parameters stay; fixed, as in the paper's default
OFFICIAL = 1.2  # the scale of the vision scripts, for who has no validation texts
# Ten scales each; for ablations whose direction is shorter, longer ones: a pilot found all inside.
FAMILIES: Mapping[str, tuple[str, dict[str, Any], tuple[float, ...]]] = {
    "arithmetic": ("task_arithmetic", {}, merges.SUMS),
    "ties": ("ties", merges.PAPER_TIES, merges.MEANS),
    "pcb": ("pcb", {"ratio": RATIO}, merges.MEANS),
    "pcb-no-intra": ("pcb", {"ratio": RATIO, "intra": False}, merges.MEANS),
    "pcb-no-inter": ("pcb", {"ratio": RATIO, "inter": "none"}, merges.MEANS),
    "pcb-no-drop": ("pcb", {"ratio": 1.0}, tuple(range(1, 11))),
    "pcb-no-share": ("pcb", {"ratio": RATIO, "share": False}, tuple(range(2, 22, 2))),
}
ABLATIONS = tuple(name for name in FAMILIES if name.startswith("pcb-"))
SEARCH, MORE = "pcb-search", 4  # a weight for each expert, by this times as many scorings


@dataclass(frozen=True)
class Tuned:
    """A merge along one direction, its scale the best of ten on validation texts."""

    name: str
    smoke: bool = False

    def __call__(self, seed: int, budget: Budget) -> Result:
        found = bed.population(seed, self.smoke)
        method, params, scales = FAMILIES[self.name]
        scales = scales[: int(budget.calls or 1)]
        along = merges.direction(found, method, **params)
        metrics, notes = merges.tuned(found, along, scales)
        if self.name == "pcb":
            official = merges.moved(found, along, OFFICIAL)
            metrics["accuracy untuned"] = found.mean_accuracy(official)
        signal = planted.relative_error(seed, method, **params)
        return Result(metrics | {"planted error": signal}, Budget(calls=len(scales)), notes)


@dataclass(frozen=True)
class Searched:
    """PCB-Merging with a weight for each expert, found without gradients."""

    smoke: bool = False

    def __call__(self, seed: int, budget: Budget) -> Result:
        found = bed.population(seed, self.smoke)
        calls = int(budget.calls or 1)
        state, history = search_weights(
            "pcb",
            list(found.experts.values()),
            found.base,
            lambda merged: merges.judge(found, merged)[0],
            bounds=(0.5, 2.5),
            init=OFFICIAL,
            budget=MORE * calls,
            seed=seed,
            names=list(found.experts),
            ratio=RATIO,
        )
        notes = {"weights": dict(zip(found.experts, history.best, strict=True))}
        return Result(merges.report(found, state), Budget(calls=len(history.history)), notes)


@dataclass(frozen=True)
class Fixed:
    """Base, experts and the average: nothing to tune."""

    name: str
    smoke: bool = False

    def __call__(self, seed: int, budget: Budget) -> Result:
        found = bed.population(seed, self.smoke)
        if self.name == "experts":
            own = {task: found.accuracy(found.experts[task], task) for task in found.tasks}
            return Result({"accuracy": sum(own.values()) / len(own)}, Budget(calls=0))
        state: bed.State = found.base
        if self.name == "average":
            state = merges.moved(found, merges.direction(found, "linear"), 1.0)
        return Result(merges.report(found, state), Budget(calls=0))


class PCBSystem:
    """The card's claim, its arms, and the method on one's own checkpoints."""

    card = card_of("36")
    config = PCBRunConfig
    notes: Mapping[str, Any] = {
        "calls": "scorings of a merge on 100 labelled validation texts of each task: ten for every "
        "method that has a scale, forty for the search of a weight for each expert",
        "planted error": "relative error of the merged direction, best scale taken out, against "
        "the noise-free mean of agreeing signals (20,000 coordinates, 5 tasks); averaging has the "
        "direction of task arithmetic",
        "ratio": "0.1, never tuned",
    }

    @property
    def claims(self) -> tuple[Claim, ...]:
        """Better than task arithmetic and TIES; each part helps; the planted signal is found."""
        low: dict[str, Any] = {"higher_is_better": False, "equal": {"calls": 0.0}}
        same = {"calls": 0.0}
        return (
            Claim("pcb", "arithmetic", "accuracy", equal=same),
            Claim("pcb", "ties", "accuracy", equal=same),
            Claim("pcb", "arithmetic", "planted error", **low),
            *(Claim("pcb", name, "accuracy", kind="ablation", equal=same) for name in ABLATIONS),
        )

    def budget(self, size: Size) -> Budget:
        """Scorings of a merge on validation texts."""
        return Budget(calls=10 if size == "full" else 2)

    def arms(self, size: Size) -> Mapping[str, Arm]:
        smoke = size == "smoke"
        found = {n: Arm(n, Fixed(n, smoke), {"arm": n}) for n in ("base", "experts", "average")}
        for name, (method, params, _) in FAMILIES.items():
            settings = {"arm": name, "method": method, **params}
            found[name] = Arm(name, Tuned(name, smoke), settings)
        found[SEARCH] = Arm(SEARCH, Searched(smoke), {"arm": SEARCH, "ratio": RATIO})
        return found

    def reported(self, evidence: Evidence) -> list[str]:
        """Compared but not claimed."""
        extra = [
            Claim("pcb", "average", "accuracy"),
            Claim("ties", "arithmetic", "accuracy"),
            Claim(SEARCH, "pcb", "accuracy"),
            Claim("pcb", "ties", "planted error", higher_is_better=False),
        ]
        judged = judge_all(extra, evidence.arms, "none", evidence.size == "full")
        return [judgement.sentence for judgement in judged]

    def run(self, config: PCBRunConfig, say: Say = print) -> Outcome:
        """On the user's checkpoints."""
        return pcb_run(config, say)


system = PCBSystem()
