"""37 Dynamic logit fusion: experts of a small model move a large one, as far as they moved theirs.

Fan et al. 2024, arXiv 2406.15480. At every step the large model's logits get the shift of one
expert, with the strength at which its distribution moves as far (in both KL directions) as the
experts' moved from the small base. No gradient, no labels.

Judged on real text of three domains, in bits per character under teacher forcing: each domain with
its own expert, and documents that switch domain every 200 characters with all three. Rivals: the
large model, the experts, proxy tuning (strength 1), and fixed strengths that were tuned with labels
on validation text over the same grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from polytask.infer.fusion import GRID
from polytask.infer.fusion_policy import Alone, FusionConfig, FusionPolicy, Policy
from polytask.infer.fusion_score import fold
from polytask.study import Arm, Budget, Claim, Evidence, Result, Size
from polytask.study.judge import judge_all
from polytask.systems import card as card_of
from polytask.systems.base import Outcome, Say
from polytask.systems.fusion_run import FusionRunConfig, fusion_run
from polytask.systems.testbeds import domain_models as bed
from polytask.systems.testbeds import domains as text

DOMAINS = text.DOMAINS
SWITCHING = "switching"
TEXTS = (*DOMAINS, SWITCHING)
LENGTH, PROMPT, EVERY = 640, 40, 200  # characters: of a document, not scored, in one domain
DYNAMIC: Mapping[str, dict[str, Any]] = {
    "dynamic": {},
    "swapped-pairing": {"pairing": "swapped"},
    "running-minimum": {"search": "running_minimum"},
    "once-per-prompt": {"search": "prompt"},
}
NAMES = ("large", "base", "expert", "proxy", "static", "static-average", "static-own", *DYNAMIC)
Strengths = tuple[float, ...]  # one per expert


@dataclass(frozen=True)
class Texts:
    """Documents of one part and what every model says of them, by name of the text."""

    ids: Mapping[str, Tensor]  # (documents, LENGTH)
    logits: Mapping[str, list[Tensor]]  # large, base, experts: (documents, LENGTH - 1, V)

    def scored(self, name: str, policy: Policy, models: Sequence[int]) -> tuple[float, Tensor]:
        """Bits per character, and alphas (characters, T) where the policy tells them."""
        ids = self.ids[name]
        spans = [(PROMPT, ids.shape[1])] * len(ids)
        found = fold([self.logits[name][m] for m in models], ids, spans, policy)
        nll = torch.cat([one.nll for one in found])
        told = [one.told["alpha"] for one in found if "alpha" in one.told]
        bits = float(nll.double().mean()) / math.log(2)
        return bits, torch.cat(told) if told else torch.zeros(0, 0)

    def static(self, name: str, experts: Sequence[int], alpha: Strengths) -> float:
        """Bits per character with fixed strengths."""
        policy = FusionPolicy(FusionConfig(mode="static", alpha=alpha), len(experts))
        return self.scored(name, policy, models_of(experts))[0]


def models_of(experts: Sequence[int]) -> list[int]:
    """Places of large, base and these experts among a family's models."""
    return [0, 1, *(2 + e for e in experts)]


@lru_cache(maxsize=4)
def texts(seed: int, part: str, smoke: bool) -> Texts:
    """Test or validation documents, the same for every arm of a seed."""
    family = bed.family(seed, bed.SMOKE if smoke else bed.FULL)
    count = 2 if smoke else {"valid": 15, "test": 30}[part]
    length = LENGTH if not smoke else LENGTH // 2
    made = {d: text.documents(d, part, count, length, seed) for d in DOMAINS}
    made[SWITCHING] = text.switching(part, 2 * count, length, EVERY, seed)
    logits = {name: family.logits(ids) for name, ids in made.items()}
    return Texts({name: torch.from_numpy(ids).long() for name, ids in made.items()}, logits)


@dataclass(frozen=True)
class Trial:
    """One arm on all four texts."""

    name: str
    smoke: bool = False

    def __call__(self, seed: int, budget: Budget) -> Result:
        test, notes = texts(seed, "test", self.smoke), dict[str, Any]()
        bits = {}
        for name in TEXTS:
            experts = range(len(DOMAINS)) if name == SWITCHING else [DOMAINS.index(name)]
            if self.name in DYNAMIC:
                policy = FusionPolicy(FusionConfig(**DYNAMIC[self.name]), len(experts))
                bits[name], alpha = test.scored(name, policy, models_of(experts))
                notes[f"{name} alpha"] = alpha.mean(0).tolist()
                notes[f"{name} acts"] = (alpha > 0).double().mean(0).tolist()
                if name == SWITCHING:
                    notes["right expert"] = _right(alpha, seed, test.ids[name].shape)
            elif self.name in ("large", "base"):
                bits[name] = test.scored(name, Alone(), [("large", "base").index(self.name)])[0]
            elif self.name == "expert":
                best = self._best_expert(seed) if name == SWITCHING else experts[0]
                bits[name] = test.scored(name, Alone(), [2 + best])[0]
                notes[f"{name} expert"] = DOMAINS[best]
            else:
                strengths = self._strengths(name, seed)
                bits[name] = test.static(name, experts, strengths)
                notes[f"{name} alpha"] = list(strengths)
        metrics: dict[str, float | None] = {f"bits {name}": bits[name] for name in TEXTS}
        metrics["bits"] = sum(bits.values()) / len(bits)
        characters = sum(ids[:, PROMPT:].numel() for ids in test.ids.values())
        return Result(metrics, Budget(steps=0, rows=budget.rows, tokens=characters), notes)

    def _strengths(self, name: str, seed: int) -> Strengths:
        """Proxy: 1 (on switching text shared by all). Static: the best of the grid on validation
        text: of the other domains, each with its own expert; 'own': of the domain itself; on
        switching text of switching text, for each expert alone and for their average."""
        everybody = range(len(DOMAINS))
        if self.name == "proxy":
            return (1.0,) if name != SWITCHING else (1 / len(DOMAINS),) * len(DOMAINS)
        valid = texts(seed, "valid", self.smoke)
        grid = GRID[::10] if self.smoke else GRID
        if name != SWITCHING:
            judged = [name] if self.name == "static-own" else [d for d in DOMAINS if d != name]
            return (min(grid, key=lambda a: _mean(valid, judged, a)),)
        shapes = [tuple(1 / len(DOMAINS) for _ in everybody)]
        if self.name != "static-average":
            shapes += [tuple(float(i == e) for i in everybody) for e in everybody]
        candidates = [tuple(a * s for s in shape) for shape in shapes for a in grid]
        return min(candidates, key=lambda c: valid.static(SWITCHING, everybody, c))

    def _best_expert(self, seed: int) -> int:
        valid = texts(seed, "valid", self.smoke)
        everybody = range(len(DOMAINS))
        return min(everybody, key=lambda e: valid.scored(SWITCHING, Alone(), [2 + e])[0])


def _mean(valid: Texts, names: Sequence[str], alpha: float) -> float:
    return sum(valid.static(n, [DOMAINS.index(n)], (alpha,)) for n in names)


def _right(alpha: Tensor, seed: int, shape: Sequence[int]) -> float:
    """Share of the steps with an acting expert in which it is the one of the text's domain."""
    documents, length = shape
    drawn = text.order_of(documents, -(-length // EVERY), "test", seed)
    domain = torch.from_numpy(drawn).repeat_interleave(EVERY, 1)[:, PROMPT:length].flatten()
    acts = alpha.max(1).values > 0
    return float((alpha.argmax(1) == domain)[acts].double().mean())


class DynamicLogitFusionSystem:
    """The card's claim, its arms, and the method on one's own models."""

    card = card_of("37")
    config = FusionRunConfig
    notes: Mapping[str, Any] = {
        "bits": "per character, teacher-forced, mean over the four texts; 'bits NAME' of one",
        "texts": f"windows of {LENGTH} characters, the first {PROMPT} not scored; switching text "
        f"changes its domain every {EVERY} characters",
        "tuning": "dynamic has none; static arms choose on labelled validation text of the seed, "
        "over dynamic's grid of 21 strengths (switching text: for each expert and the average)",
        "budget": "steps: of training at judging time; the models of a seed are shared by all "
        "arms. rows and tokens: documents and characters scored. 'large' and 'expert' run one "
        "model where fusion runs three or five",
        "right expert": "share of dynamic's steps with an acting expert in which it is the one "
        "of the domain that the text is in",
    }

    @property
    def claims(self) -> tuple[Claim, ...]:
        """The sheet's pass lines, and its three ablations."""
        low: dict[str, Any] = {"higher_is_better": False, "equal": {"tokens": 0.0, "rows": 0.0}}
        found = []
        for domain in DOMAINS:
            found += [Claim("dynamic", r, f"bits {domain}", **low) for r in ("large", "expert")]
        for rival in ("large", "static", "static-average"):
            found.append(Claim("dynamic", rival, f"bits {SWITCHING}", **low))
        for rival in [name for name in DYNAMIC if name != "dynamic"]:
            found.append(Claim("dynamic", rival, "bits", kind="ablation", **low))
        return tuple(found)

    def budget(self, size: Size) -> Budget:
        """Documents: so many of each domain, and twice as many that switch."""
        return Budget(steps=0, rows=5 * (30 if size == "full" else 2))

    def arms(self, size: Size) -> Mapping[str, Arm]:
        smoke = size == "smoke"
        return {name: Arm(name, Trial(name, smoke), {"arm": name}) for name in NAMES}

    def reported(self, evidence: Evidence) -> list[str]:
        """Compared but not claimed: proxy tuning, and strengths tuned on the very domain."""
        low: dict[str, Any] = {"higher_is_better": False, "equal": {}}
        extra = [Claim("dynamic", "proxy", f"bits {name}", **low) for name in TEXTS]
        for rival in ("static", "static-own"):
            extra += [Claim("dynamic", rival, f"bits {name}", **low) for name in DOMAINS]
        judged = judge_all(extra, evidence.arms, "none", evidence.size == "full")
        return [judgement.sentence for judgement in judged]

    def run(self, config: FusionRunConfig, say: Say = print) -> Outcome:
        """On the user's models: continuations, a table of every step, page and pictures."""
        return fusion_run(config, say)


system = DynamicLogitFusionSystem()
