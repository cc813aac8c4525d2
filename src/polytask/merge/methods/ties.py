"""TIES: trim small changes, elect a sign for every coordinate, average those who agree.

"TIES-Merging: Resolving Interference When Merging Models" (Yadav et al. 2023, arXiv 2306.01708).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from polytask.errors import MergeError
from polytask.merge import select
from polytask.merge.method import (
    METHODS,
    State,
    TensorInfo,
    required,
)
from polytask.merge.methods.consensus import Thinned, Vote, keep_elected_
from polytask.merge.vectors import TaskVectors

Scope = Literal["tensor", "model"]


def model_rank(count: int, density: float) -> int:
    """Rank of the threshold when all tensors are trimmed together, as in the paper's code:
    the (D - int(density D))-th smallest magnitude and all above stay, int(density D) + 1."""
    return max(0, count - int(density * count) - 1)


@METHODS.register("ties")
class Ties(Thinned):
    """theta = theta_0 + scale * (mean over those who have the elected sign of the trimmed tau_k).

    Trimming keeps the `density` largest magnitudes of each task vector. Peers differ in silence:

    - trim: per 'tensor' (mergekit, PEFT), or over the whole 'model' at once (the paper's code;
      two passes over the tensors). The counts differ by one: see `select.kept`, `model_rank`.
      Of equal magnitudes at the threshold all stay.
    - vote: by, weigh, divide and draw, see `Vote`. mergekit is the default with `divide: weights`
      (`normalize: true`) or `none`; PEFT is `weigh: after, divide: counts`; the paper's code is
      `trim: model, draw: majority, divide: counts` with equal weights.
    - scale: the paper's lambda.

    As trimming is what the method does, one expert at weight 1 gives that expert only at
    density 1; below, it gives the expert on the coordinates kept and the base elsewhere.
    """

    title: ClassVar[str] = "TIES"

    trim: Literal["tensor", "model"] = "tensor"
    vote: Vote | None = Vote()

    @property
    def passes(self) -> tuple[str, ...]:
        return (*(("magnitudes", "thresholds") if self.trim == "model" else ()), *super().passes)

    @property
    def elementwise(self) -> bool:
        return self.trim == "model"

    @property
    def local(self) -> frozenset[str]:
        return super().local - ({"trim", "density"} if self.trim == "model" else {"trim"})

    def measure(
        self, number: int, models: Tensor, base: Tensor | None, where: TensorInfo, state: State
    ) -> Any:
        kind = self.passes[number]
        if kind == "elected signs":
            return super().measure(number, models, base, where, state)
        words = [select.magnitude_words(row) for row in models.sub_(required(base))]
        if kind == "magnitudes":
            return [select.high_counts(each) for each in words]
        bins = state["bins"]
        return [select.low_counts(each, high) for each, (high, _) in zip(words, bins, strict=True)]

    def combine(self, number: int, one: Any, other: Any) -> Any:
        if self.passes[number] == "elected signs":
            return super().combine(number, one, other)
        return select.add_counts(one, other)

    def finish(self, number: int, total: Any, state: State, names: Sequence[str]) -> State:
        kind = self.passes[number]
        if kind == "elected signs":
            return super().finish(number, total, state, names)
        if kind == "magnitudes":
            densities = self.values("density", len(total))
            return {
                "bins": [
                    select.find_bin(counts, model_rank(int(counts.sum()), density))
                    for counts, density in zip(total, densities, strict=True)
                ]
            }
        return {
            "thresholds": [
                select.from_magnitude(high << 16 | select.find_bin(counts, rest)[0])
                for counts, (high, rest) in zip(total, state["bins"], strict=True)
            ]
        }

    def thinned(self, deltas: Tensor, where: TensorInfo, state: State) -> Tensor:
        if self.trim == "model":
            for row, threshold in zip(deltas, state["thresholds"], strict=True):
                select.zero_below_(row, threshold)
        else:
            for row, density in zip(deltas, self.values("density", len(deltas)), strict=True):
                select.keep_largest_(row, density)
        return deltas


def ties_vectors(vectors: TaskVectors, keep: float = 0.2) -> TaskVectors:
    """Task vectors trimmed and purged of what goes against the elected sign, still one per task.

    The preprocessing of AdaMerging++ (Yang et al. 2024, arXiv 2310.02575): over all tensors at
    once each task keeps its `keep` largest magnitudes (int(keep D) + 1, all equal ones included),
    a sign is elected from the trimmed vectors with draws going to the majority of the elected
    signs, and every entry of another sign becomes 0. Nothing is averaged: each task still gets its
    own coefficient. Returns new task vectors; `MergeError` for `keep` outside (0, 1].
    """
    if not 0 < keep <= 1:
        raise MergeError(f"ties_vectors: keep is a fraction above 0, at most 1, got {keep}")
    vote = Vote(draw="majority")
    flat = vectors.flatten()  # (K, D), a copy
    for row in flat:
        rank = model_rank(row.numel(), keep)
        select.zero_below_(row, select.kth_magnitude(row, rank))
    balance = torch.sign(flat.sum(0)).sum(dtype=torch.float64)
    keep_elected_(flat, vote, int(balance.sign()))
    return vectors.with_deltas(vectors.unflatten(flat))
