"""Documents of the domains, every model's logits on them, and what a policy's bits are.

Two sets of domains, each with documents that switch between its three: those that the generalists
were trained on, and those that they never saw. All arms of a seed share texts and logits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from polytask.infer.fusion_policy import Alone, FusionConfig, FusionPolicy, Policy
from polytask.infer.fusion_score import fold
from polytask.systems.testbeds import domain_models as bed
from polytask.systems.testbeds import domains as text

DOMAINS = text.DOMAINS
SETS: Mapping[str, Sequence[str]] = {"new": text.NEW, "known": text.KNOWN}
SWITCHING = {kind: f"switching {kind}" for kind in SETS}
TEXTS = {kind: (*names, SWITCHING[kind]) for kind, names in SETS.items()}
LENGTH, PROMPT, EVERY = 640, 40, 200  # characters: of a document, not scored, in one domain
Strengths = tuple[float, ...]  # one per expert


@dataclass(frozen=True)
class Texts:
    """Documents of one part and what every model says of them, by name of the text."""

    ids: Mapping[str, Tensor]  # (documents, LENGTH)
    logits: Mapping[str, Mapping[int, Tensor]]  # by model: (documents, LENGTH - 1, V)

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


def experts_of(name: str) -> list[int]:
    """Places in DOMAINS of a text's experts: the domain's own, or all of the set."""
    kind = next(kind for kind, names in TEXTS.items() if name in names)
    return [DOMAINS.index(n) for n in (SETS[kind] if name == SWITCHING[kind] else [name])]


def models_of(experts: Sequence[int]) -> list[int]:
    """Places of large, base and these experts among a family's models."""
    return [0, 1, *(2 + e for e in experts)]


@lru_cache(maxsize=2)
def texts(seed: int, part: str, smoke: bool) -> Texts:
    """Test or validation documents, the same for every arm of a seed."""
    family = bed.family(seed, bed.SMOKE if smoke else bed.FULL)
    count = 2 if smoke else {"valid": 15, "test": 30}[part]
    length = LENGTH if not smoke else LENGTH // 2
    made = {d: text.documents(d, part, count, length, seed) for d in DOMAINS}
    for kind, names in SETS.items():
        made[SWITCHING[kind]] = text.switching(part, 2 * count, length, EVERY, seed, names)
    logits = {n: family.logits(ids, models_of(experts_of(n))) for n, ids in made.items()}
    return Texts({name: torch.from_numpy(ids).long() for name, ids in made.items()}, logits)


@lru_cache(maxsize=4096)
def validated(seed: int, name: str, alpha: Strengths, smoke: bool) -> float:
    """Bits of fixed strengths on validation text; several static arms ask for the same."""
    return texts(seed, "valid", smoke).static(name, experts_of(name), alpha)


def best_expert(seed: int, name: str, experts: Sequence[int], smoke: bool) -> int:
    """The domain's own; on switching text the best of the set on validation text."""
    if len(experts) == 1:
        return experts[0]
    valid = texts(seed, "valid", smoke)
    return min(experts, key=lambda e: valid.scored(name, Alone(), [2 + e])[0])


def right_expert(alpha: Tensor, seed: int, shape: Sequence[int], kind: str) -> float:
    """Share of the steps with an acting expert in which it is the one of the text's domain."""
    documents, length = shape
    drawn = text.order_of(documents, -(-length // EVERY), "test", seed, SETS[kind])
    domain = torch.from_numpy(drawn).repeat_interleave(EVERY, 1)[:, PROMPT:length].flatten()
    acts = alpha.max(1).values > 0
    return float((alpha.argmax(1) == domain)[acts].double().mean())
