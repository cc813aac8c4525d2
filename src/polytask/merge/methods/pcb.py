"""PCB-Merging: parameters compete, within their task by strength and across tasks by agreement.

"Parameter Competition Balancing for Model Merging" (Du et al. 2024, arXiv 2410.02396). Of the four
scripts in the paper's repository no two agree; `inter` names the differences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from polytask.errors import MergeError
from polytask.merge import select
from polytask.merge.method import METHODS, Method, State, TensorInfo, Weights, required
from polytask.merge.vectors import TaskVectors

PASSES = ("magnitudes", "bounds of magnitudes", "scores", "thresholds of scores")


@METHODS.register("pcb")
class PCB(Method):
    """theta = theta_0 + sum_k w_k s_k tau'_k / sum_k s_k, s_k in [0, 1] the parameters' shares.

    For N task vectors over all D parameters of the model, row by row (norm is min-max):

        tau'  = sign(tau) * |tau| clamped to its `clip` and 1 - `clip` quantiles
        n     = norm(|tau'|),  t = sign(tau) n
        score = exp(N n^2) * agreement      (the paper's softmax has a denominator that cancels)
        s     = norm(score clamped from below to its 1 - `ratio` quantile): 0 but for the top

    `inter` is the agreement: 'pairwise' sum_j tanh(t_i t_j) (pcb_ES.py, nearest to the paper; the
    default), 'sum_norm' tanh(tau_i sum_j t_j) (pcb.py), 'sum_raw' tanh(tau_i sum_j tau_j) (the
    top-level script and the one for language models), 'none' 1. `clip` is .01 in the vision
    scripts, .0001 in the top-level one. Switched off, `intra` and `share` are the paper's
    ablations: no strength within the task, no division by the sum of shares.

    `scope: model` compares all parameters of the model, as the authors do, in four passes over
    the tensors; `tensor` compares within each tensor, which is another method and often worse.

    Contracting by design: K equal task vectors give base + w tau' on the top parameters and the
    base elsewhere. Where all tasks cancel exactly (two opposite task vectors) the official code
    returns NaN; here no parameter has a share and the base stays. A model with magnitudes that do
    not vary (an expert that is the base) has no strengths to compare: an error names it; within
    one tensor (`scope: tensor`) its changed entries all get share 1.
    """

    title: ClassVar[str] = "PCB-Merging"
    models: ClassVar[tuple[int, int | None]] = (2, None)
    per_model: ClassVar[tuple[str, ...]] = ("weight",)

    weight: Weights = 1.2
    ratio: Annotated[float, Field(gt=0, le=1)] = 0.1
    clip: Annotated[float, Field(ge=0, lt=0.5)] = 0.01
    inter: Literal["pairwise", "sum_norm", "sum_raw", "none"] = "pairwise"
    intra: bool = True
    share: bool = True
    scope: Literal["model", "tensor"] = "model"

    @property
    def passes(self) -> tuple[str, ...]:
        return PASSES if self.scope == "model" else ()

    @property
    def elementwise(self) -> bool:
        return self.scope == "model"

    @property
    def local(self) -> frozenset[str]:
        changeable = {"weight"} if self.scope == "model" else set(type(self).model_fields)
        return frozenset(changeable - {"scope"})

    def identity(self, count: int) -> PCB | None:
        return None  # the weakest parameter of a row has no share, whatever the ratio

    def measure(
        self, number: int, models: Tensor, base: Tensor | None, where: TensorInfo, state: State
    ) -> Any:
        return self._counts(number, models.sub_(required(base)), state)

    def combine(self, number: int, one: Any, other: Any) -> Any:
        return select.add_counts(one, other)

    def finish(self, number: int, total: Any, state: State, names: Sequence[str]) -> State:
        if number % 2 == 0:
            return {**state, "bins": self._bins(number, total)}
        pairs = zip(total, state["bins"], strict=True)
        words = [high << 16 | select.find_bin(counts, rest)[0] for counts, (high, rest) in pairs]
        value = select.from_magnitude if number == 1 else select.from_ordered
        bounds = [
            (value(low), value(top)) for low, top in zip(words[::2], words[1::2], strict=True)
        ]
        if number == 3:
            return {**state, "scores": bounds}
        for name, (low, top) in zip(names, bounds, strict=True):
            if self.scope == "model" and low == top:
                raise MergeError(
                    f"{name}: all of its changes have the magnitude {low:g}; {self.title} compares "
                    "magnitudes"
                    + (" (the model is the base itself: leave it out)" if low == 0 else "")
                )
        return {**state, "magnitudes": bounds}

    def merge(
        self,
        models: Tensor,
        base: Tensor | None,
        where: TensorInfo,
        state: State,
        extra: Sequence[Tensor] | None = None,
    ) -> Tensor:
        origin = required(base)
        deltas = models.sub_(origin)
        if not deltas.numel():
            return origin.clone()
        if self.scope == "tensor":
            for number in range(len(PASSES)):
                state = self.finish(
                    number, self._counts(number, deltas, state), state, where.models
                )
        values = self.values("weight", len(deltas))
        flat = deltas.view(len(deltas), -1)
        for block in select.blocks(flat.shape[1]):
            clamped, shares = self.shares(flat[:, block], state)
            total, divisor = torch.zeros_like(clamped[0]), torch.zeros_like(clamped[0])
            for row, share, value in zip(clamped, shares, values, strict=True):
                total.add_(row.mul_(share).mul_(value))
                divisor.add_(share)
            if self.share:
                total.div_(divisor.clamp_(min=1e-12))
            flat[0, block] = total
        return deltas[0].add_(origin)

    def shares(self, deltas: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """(K, B) clamped task vectors tau' and (K, B) shares s of B parameters."""
        clamped, strength = self._strengths(deltas, state)
        made = self._scores(deltas, strength)
        bounds = zip(state["scores"], state["magnitudes"], strict=True)
        for row, delta, ((low, top), (weakest, strongest)) in zip(
            made, deltas, bounds, strict=True
        ):
            if weakest == strongest:
                torch.ne(delta, 0, out=row)
            elif low == top:
                # Nothing distinguishes the parameters. All cancel (two opposite tasks): no share.
                row.zero_()
            else:
                row.clamp_(min=low).sub_(low).div_(top - low)
        return clamped, made

    def _strengths(self, deltas: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """tau' and t = sign(tau) norm(|tau'|)."""
        clamped, signs = deltas.abs(), deltas.sign()
        strength = torch.empty_like(clamped)
        for row, norm, (low, top) in zip(clamped, strength, state["magnitudes"], strict=True):
            row.clamp_(low, top)
            torch.sub(row, low, out=norm).div_(top - low if top > low else 1.0)
        return clamped.mul_(signs), strength.mul_(signs)

    def _scores(self, deltas: Tensor, strength: Tensor) -> Tensor:
        """(K, B) scores, divided by e^N: shares do not change, and many tasks do not overflow."""
        count = len(deltas)
        scores = torch.ones_like(deltas)
        if self.inter == "pairwise":
            scores.zero_()
            for score, one in zip(scores, strength, strict=True):
                for other in strength:
                    score.add_(torch.tanh(one * other))
        elif self.inter != "none":
            source, total = strength if self.inter == "sum_norm" else deltas, scores[0].clone()
            total.zero_()
            for row in source:
                total.add_(row)
            torch.mul(deltas, total, out=scores).tanh_()
        if self.intra:
            scores.mul_(strength.square().sub_(1).mul_(count).exp_())
        # Thresholds are float32: a float64 score must not exceed its own threshold by a rounding,
        # since a share of 1e-9 becomes the whole when the other tasks have none.
        return scores.float().to(deltas.dtype)

    def _counts(self, number: int, deltas: Tensor, state: State) -> list[select.Counts]:
        flat = deltas.view(len(deltas), -1)
        total: list[select.Counts] = []
        for block in select.blocks(flat.shape[1], 4 * select.BLOCK):
            piece = flat[:, block]
            if number < 2:
                words = [select.magnitude_words(row) for row in piece]
            else:
                scores = self._scores(piece, self._strengths(piece, state)[1])
                words = [select.ordered_words(row) for row in scores]
            if number % 2 == 0:
                counts = [select.high_counts(each) for each in words]
            else:
                pairs = zip([w for each in words for w in (each, each)], state["bins"], strict=True)
                counts = [select.low_counts(each, high) for each, (high, _) in pairs]
            total = select.add_counts(total, counts) if total else counts
        width = len(deltas) * (1 + number % 2)
        return total or [select.high_counts(select.magnitude_words(flat[0]))] * width

    def _bins(self, number: int, total: list[select.Counts]) -> list[tuple[int, int]]:
        """Bins of the lower and upper order statistic of each row."""
        bins = []
        for counts in total:
            size = int(counts.sum())
            if not size:
                raise MergeError(f"{self.title}: there are no parameters to merge")
            if number == 0:
                ranks = int(size * self.clip), int(size * (1 - self.clip) - 1)
            else:
                ranks = int(size * (1 - self.ratio)), size - 1
            lower, upper = (min(max(rank, 0), size - 1) for rank in ranks)
            bins += [select.find_bin(counts, lower), select.find_bin(counts, max(lower, upper))]
        return bins


def pcb_shares(vectors: TaskVectors, method: PCB) -> tuple[Tensor, Tensor]:
    """(K, D) clamped task vectors and (K, D) shares over the whole model, columns as in
    `TaskVectors.flatten`: for searching weights and for looking at who survives where."""
    flat, state = vectors.flatten(), dict[str, Any]()
    for number in range(len(PASSES)):
        counts = method._counts(number, flat, state)
        state = dict(method.finish(number, counts, state, vectors.names))
    parts = [method.shares(flat[:, block], state) for block in select.blocks(flat.shape[1])]
    return torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts], 1)
