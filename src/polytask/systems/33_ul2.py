"""33 UL2: one model that fills in and continues, by a mixture of denoisers.

Tay, Dehghani et al. 2022, arXiv 2205.05131. Seven denoisers (short spans, long spans, half of the
text, prefix LM), each announced by a mode token; the user picks the mode that fits the task.

Judged on English prose, on continuing and filling in, against T5's span corruption alone and prefix
LM alone: all go on with one small causal model, read as a prefix decoder, and see equally many
tokens (UL2R). The regret of an arm on a test is its -log p per token less the best of the three
arms'; a model that is not dominated has the smallest largest regret. Baselines are judged by the
best form they can be asked in, the mixture by the one that its modes prescribe.
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
from polytask.systems import card as card_of
from polytask.systems.base import Outcome, Say, read_tuning
from polytask.systems.testbeds import denoisers as bed
from polytask.systems.ul2_run import UL2RunConfig, ul2_run

TRAINED: Mapping[str, bed.Arm] = {
    "mod": "mod",
    "span corruption": "sc",
    "prefix LM": "plm",
    "wrong mode": "mod",
    "no modes": "silent",
    "no S": "no-s",
}
RIVALS = ("mod", "span corruption", "prefix LM")  # regret is over the best of these
LRS = (5e-4, 1e-3, 2e-3)
TUNING_SEEDS = (1000,)  # never judged on
FULL = bed.Bench()
SMOKE = bed.Bench(
    dim=16,
    heads=2,
    layers=1,
    base=2000,
    tokens=4000,
    chunks=8,
    held_out=12,
    base_length=32,
    finetuning=2,
)


@dataclass(frozen=True)
class Trial:
    """One arm: pretrain (or find what was kept), score on held-out prose, compare with rivals."""

    name: str
    lr: float
    rivals: tuple[tuple[str, float], ...] = ()  # rival -> learning rate; () while tuning
    smoke: bool = False

    def __call__(self, seed: int, budget: Budget) -> Result:
        torch.set_num_threads(1)
        bench = SMOKE if self.smoke else FULL
        arm = TRAINED[self.name]
        found = bed.scores(bench, arm, self.lr, seed)
        metrics: dict[str, float] = {}
        for part in ("valid", "test"):
            each = {test: self._score(found[part], test) for test in bed.TESTS}
            metrics |= {f"{part} {test}": value for test, value in each.items()}
            metrics[f"{part} mean"] = sum(each.values()) / len(each)
        if self.rivals:
            metrics |= self._regret(bench, metrics, seed)
        if arm in ("mod", "silent"):
            for test in bed.TESTS:
                right = found["test"][f"{test}/{bed.FORM[test]}/{bed.MODE[test]}"]
                metrics[f"mode effect {test}"] = bed.wrong_mode(found["test"], test) - right
        notes = {key: found[key] for key in ("test", "curves", "trained", "efficiency")}
        notes["parameters"] = found["parameters"]
        metrics |= {f"finetuned {name}": v for name, v in found.get("downstream", {}).items()}
        return Result(dict(metrics), Budget(tokens=found["tokens"]), notes)

    def _score(self, found: Mapping[str, float], test: bed.Test) -> float:
        if self.name == "wrong mode":
            return bed.wrong_mode(found, test)
        return bed.best(TRAINED[self.name], found, test)

    def _regret(self, bench: bed.Bench, own: Mapping[str, float], seed: int) -> dict[str, float]:
        """-log p above the best rival's, per test and at most; then with rivals that may also
        fill in from left to right."""
        scores = {n: bed.scores(bench, TRAINED[n], lr, seed)["test"] for n, lr in self.rivals}
        found: dict[str, float] = {}
        for blind, words in ((False, ""), (True, " (left to right too)")):
            each = {}
            for test in bed.TESTS:
                least = min(bed.best(TRAINED[n], s, test, blind) for n, s in scores.items())
                mine = own[f"test {test}"]
                if blind and self.name in scores:
                    mine = bed.best(TRAINED[self.name], scores[self.name], test, blind)
                each[f"regret {test}{words}"] = mine - least
            found |= {**each, f"largest regret{words}": max(each.values())}
        return found


def arm(
    name: str, size: Size, point: Mapping[str, Any], rivals: tuple[tuple[str, float], ...] = ()
) -> Arm:
    """The arm `name` at a learning rate."""
    return Arm(name, Trial(name, float(point["lr"]), rivals, size == "smoke"), dict(point))


class UL2System:
    """The card's claim, its arms, and the method on one's own text."""

    card = card_of("33")
    config = UL2RunConfig
    tuning_file = Path(__file__).with_name("33_ul2.tuning.json")
    equal: Mapping[str, float] = {"tokens": 0.01}
    notes: Mapping[str, Any] = {
        "score": "-log p per token of the original text among tokens of text: sentinels, mode "
        "tokens and ends neither count nor get probability",
        "forms": "baselines and ablations are judged by the best form and mode that shows them all "
        "that is given (as a prefix LM or with sentinels), the mixture by the one that UL2 "
        "prescribes",
        "left to right": "a prefix LM can also fill in blindly, each gap from what precedes it; "
        "that account is reported beside the claims, and at this size it changes the result",
        "regime": "pilots with other seeds trained encoder-decoders from scratch, as the sheet "
        "has it; in what two cores can train none learned to look ahead of a gap, and prefix LM "
        "alone, whose every second token is a target, led everywhere. So all arms go on with one "
        "pretrained causal model, UL2R, and the proof's seeds are fresh",
        "loss": "every example has the same say; averaged over tokens, long targets dominate",
        "scale": "the mean spans 3, 8, 64 become 3, 5, 16 with the inputs; prefix LM alone splits "
        "uniformly, as T5's does",
        "wrong mode": "the mean over the two other modes' tokens, on the same model",
    }

    @property
    def claims(self) -> tuple[Claim, ...]:
        """The sheet's pass lines."""
        lower: Any = {"higher_is_better": False}
        ablation: Any = {"kind": "ablation", **lower}
        return (
            Claim("mod", "span corruption", "largest regret", **lower),
            Claim("mod", "prefix LM", "largest regret", **lower),
            Claim("mod", "wrong mode", "test continuation", **ablation),
            Claim("mod", "wrong mode", "test infill 50", **ablation),
            Claim("mod", "no S", "test continuation", **ablation),
            Claim("mod", "no modes", "mode effect continuation", kind="ablation"),
        )

    def budget(self, size: Size) -> Budget:
        return Budget(tokens=(FULL if size == "full" else SMOKE).tokens)

    def arms(self, size: Size) -> Mapping[str, Arm]:
        """Learning rates as chosen on the tuning seed (ablations have the mixture's); a smoke run
        takes the first of the grid."""
        rates = dict.fromkeys(RIVALS, LRS[0])
        if size == "full":
            chosen = self.tuning.chosen
            rates = {name: float(chosen[name]["lr"]) for name in RIVALS}
        rivals = tuple(rates.items())
        points = {name: {"lr": rates.get(name, rates["mod"])} for name in TRAINED}
        return {name: arm(name, size, points[name], rivals) for name in TRAINED}

    @property
    def tuning(self) -> Tuning:
        return read_tuning(self.tuning_file)

    def tune(self, executor: Executor) -> Tuning:
        """Three learning rates for each rival, the mean of the three tests on validation text."""
        found, _ = tune(
            {name: partial(arm, name, "full") for name in RIVALS},
            {"lr": LRS},
            TUNING_SEEDS,
            self.budget("full"),
            "valid mean",
            name=f"{self.card.key}-tuning",
            higher_is_better=False,
            executor=executor,
        )
        return found

    def reported(self, evidence: Evidence) -> list[str]:
        """Compared but not claimed: each test by itself, and the mixture against its ablations."""
        lower: Any = {"higher_is_better": False}
        extra = [
            *(Claim("mod", name, f"test {t}", **lower) for name in RIVALS[1:] for t in bed.TESTS),
            Claim("mod", "wrong mode", "test infill 15", **lower),
            *(Claim("mod", "no modes", f"test {t}", **lower) for t in bed.TESTS),
            *(Claim("mod", "no S", f"test {t}", **lower) for t in bed.TESTS[1:]),
            Claim("mod", "no modes", "mode effect infill 50"),
            *(Claim("mod", n, "largest regret (left to right too)", **lower) for n in RIVALS[1:]),
        ]
        if None not in evidence.arms["mod"].values("finetuned completion"):
            extra += [Claim("mod", name, "finetuned field accuracy") for name in RIVALS[1:]]
            extra += [Claim("mod", name, "finetuned completion", **lower) for name in RIVALS[1:]]
        judged = judge_all(extra, evidence.arms, "none", evidence.size == "full")
        return [judgement.sentence for judgement in judged]

    def run(self, config: UL2RunConfig, say: Say = print) -> Outcome:
        """On the user's text: pretrain with the mixture, then answer in each mode."""
        return ul2_run(config, say)


system = UL2System()
