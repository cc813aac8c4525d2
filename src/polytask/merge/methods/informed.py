"""Merges that know how the models use their weights: Fisher weighting and RegMean.

Both take statistics by tensor name that were gathered beforehand on each model's own inputs
(`polytask.merge.statistics`); the merge itself needs no data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from polytask.errors import MergeError
from polytask.merge.method import METHODS, Method, State, TensorInfo, Weights, weighted_sum
from polytask.merge.methods.averages import positive, share_out
from polytask.merge.vectors import check_finite

Base = Literal["needed", "used", "ignored"]


@METHODS.register("fisher")
class Fisher(Method):
    """theta = sum_k w_k F_k theta_k / sum_k w_k F_k, coordinate by coordinate (F: the diagonal of
    the Fisher information; "Merging Models with Fisher-Weighted Averaging", Matena & Raffel 2022,
    arXiv 2111.09832, equation 6).

    `floor` is the least Fisher value, as in the authors' code (1e-6): where no model cares for a
    weight, their average is taken. A statistic has the tensor's shape. Tensors without one are an
    error, or averaged with `missing: average`.
    """

    title: ClassVar[str] = "Fisher averaging"
    base: ClassVar[Base] = "ignored"
    per_model: ClassVar[tuple[str, ...]] = ("weight",)
    extra: ClassVar[str | None] = "fisher"

    weight: Weights = 1.0
    floor: Annotated[float, Field(gt=0)] = 1e-6
    missing: Literal["error", "average"] = "error"

    @property
    def elementwise(self) -> bool:
        return True

    def check(self, count: int, has_base: bool) -> None:
        super().check(count, has_base)
        positive(self.values("weight", count), self.title)

    def merge(
        self,
        models: Tensor,
        base: Tensor | None,
        where: TensorInfo,
        state: State,
        extra: Sequence[Tensor] | None = None,
    ) -> Tensor:
        values = self.values("weight", len(models))
        if extra is None:
            if self.missing == "error":
                raise MergeError(
                    f"{self.title}: there is no Fisher information for tensor '{where.name}'; "
                    "gather it, or set 'missing: average'"
                )
            return weighted_sum(models, share_out(values, self.title))
        total = torch.zeros_like(models[0])
        # Shares are formed before they are applied: products with values of 1e-12 and less, which
        # Fisher information has, would lose digits.
        shares = torch.empty_like(models)
        for share, fisher, value, name in zip(shares, extra, values, where.models, strict=True):
            if fisher.numel() != models[0].numel():
                raise MergeError(
                    f"{name}: the Fisher information of '{where.name}' has shape "
                    f"{tuple(fisher.shape)}, the tensor has {tuple(models.shape[1:])}"
                )
            check_finite(fisher, f"Fisher information of {where.name}", name)
            if bool((fisher < 0).any()):
                raise MergeError(f"{name}: Fisher information of '{where.name}' is negative")
            share.copy_(fisher.view(share.shape)).clamp_(min=self.floor).mul_(value)
            total.add_(share)
        merged = models[0].mul_(shares[0].div_(total))
        for model, share in zip(models[1:], shares[1:], strict=True):
            merged.add_(model.mul_(share.div_(total)))
        return merged


@METHODS.register("regmean")
class RegMean(Method):
    """W = (sum_k G_k)^-1 sum_k G_k W_k for linear layers, G_k = X_k^T X_k of their inputs: the
    weights whose outputs are nearest to each model's own on its own inputs ("Dataless Knowledge
    Fusion by Merging Weights of Language Models", Jin et al. 2023, arXiv 2212.09849, equation 2).

    Off-diagonal entries of G are multiplied by `reduce` (the paper's alpha, .9). A statistic is
    (in, in) for a weight (out, in) as torch stores it; `inputs: first` is for weights stored as
    (in, out) (GPT-2's Conv1D). Tensors without a statistic are averaged, as in the paper. `ridge`
    times the mean diagonal is added to every G_k: inputs that never occurred get the average.
    """

    title: ClassVar[str] = "RegMean"
    base: ClassVar[Base] = "ignored"
    per_model: ClassVar[tuple[str, ...]] = ("weight",)
    extra: ClassVar[str | None] = "gram"

    weight: Weights = 1.0
    reduce: Annotated[float, Field(ge=0, le=1)] = 0.9
    ridge: Annotated[float, Field(gt=0, lt=1)] = 1e-8
    inputs: Literal["last", "first"] = "last"

    def check(self, count: int, has_base: bool) -> None:
        super().check(count, has_base)
        positive(self.values("weight", count), self.title)

    def merge(
        self,
        models: Tensor,
        base: Tensor | None,
        where: TensorInfo,
        state: State,
        extra: Sequence[Tensor] | None = None,
    ) -> Tensor:
        values = self.values("weight", len(models))
        if extra is None:
            return weighted_sum(models, share_out(values, self.title))
        first = self.inputs == "first"
        width = models.shape[1] if first else models[0, 0].numel()
        left = torch.zeros(width, width, dtype=torch.float64, device=models.device)
        right = torch.zeros(width, models[0].numel() // width, dtype=torch.float64).to(left)
        for model, each, value, name in zip(models, extra, values, where.models, strict=True):
            if tuple(each.shape) != (width, width):
                raise MergeError(
                    f"{name}: the gram matrix of '{where.name}' has shape {tuple(each.shape)}, "
                    f"its inputs need {(width, width)}"
                )
            check_finite(each, f"gram matrix of {where.name}", name)
            gram = each.to(left).mul(self.reduce)  # a copy
            diagonal = each.diagonal().to(left)
            mean = float(diagonal.mean()) or 1.0
            gram.diagonal().copy_(diagonal + self.ridge * mean)
            gram.mul_(value)
            left.add_(gram)
            right.addmm_(
                gram, (model.reshape(width, -1) if first else model.reshape(-1, width).T).double()
            )
        solved: Tensor = torch.linalg.solve(left, right)
        merged = solved if first else solved.T
        return merged.to(models.dtype).reshape(models.shape[1:]).contiguous()
