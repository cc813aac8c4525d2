"""Merges on the sphere: SLERP, its forms for more models, and model stock.

All of them are weighted sums of the models whose coefficients depend only on lengths and angles,
that is, on the Gram matrix of the K versions of a tensor (or of each of its rows). So the tensors
are read twice, once for the Gram matrix and once for the sum, and everything between is K x K
arithmetic in float64, iterations included.

Legend: K models, R vectors (1 for a whole tensor), C entries of a vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from polytask.errors import MergeError
from polytask.merge import select
from polytask.merge.method import (
    METHODS,
    Method,
    State,
    TensorInfo,
    Weights,
    required,
)
from polytask.merge.methods.averages import positive, share_out

Vectors = Literal["tensor", "rows", "columns"]
Base = Literal["needed", "used", "ignored"]


def as_vectors(models: Tensor, vectors: Vectors) -> Tensor:
    """(K, R, C) view or copy: the whole tensor as one vector, or those along the last or first
    dimension. Tensors without two dimensions are one vector."""
    if vectors == "tensor" or models.dim() < 3:
        return models.reshape(len(models), 1, -1)
    if vectors == "columns":
        models = models.movedim(1, -1)
    return models.reshape(len(models), -1, models.shape[-1])


def from_vectors(merged: Tensor, shape: torch.Size, vectors: Vectors) -> Tensor:
    """Inverse of `as_vectors` for one merged (R, C)."""
    if vectors == "columns" and len(shape) > 1:
        return merged.reshape(*shape[1:], shape[0]).movedim(-1, 0).contiguous()
    return merged.reshape(shape)


def gram(models_KRC: Tensor) -> Tensor:
    """(R, K, K) float64 inner products of the models' vectors."""
    count, vectors = models_KRC.shape[:2]
    found = torch.zeros(vectors, count, count, dtype=torch.float64)
    for i in range(count):
        for j in range(i, count):
            one, other = models_KRC[i], models_KRC[j]
            if vectors == 1:
                products: float | Tensor = select.dot(one, other)
            else:
                products = (one * other).sum(-1, dtype=torch.float64).cpu()
            found[:, i, j] = products
            found[:, j, i] = products
    return found


def combine(models_KRC: Tensor, coefficients_RK: Tensor) -> Tensor:
    """(R, C) sum over models, in the memory of `models`."""
    factors = coefficients_RK.to(models_KRC)
    total = models_KRC[0].mul_(factors[:, 0, None])
    for k in range(1, len(models_KRC)):
        total.add_(models_KRC[k].mul_(factors[:, k, None]))
    return total


def lengths_and_cosines(gram_RKK: Tensor) -> tuple[Tensor, Tensor]:
    """(R, K) lengths and (R, K, K) cosines; those of a zero vector are 0, its own too."""
    lengths = gram_RKK.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    safe = lengths.masked_fill(lengths == 0, 1.0)
    return lengths, (gram_RKK / safe[:, :, None] / safe[:, None, :]).clamp(-1, 1)


def slerp_coefficients(gram_RKK: Tensor, t: float, linear_above: float) -> Tensor:
    """(R, 2): sin((1-t) w) / sin w and sin(t w) / sin w, w the angle between the two models;
    1-t and t where |cos w| > `linear_above` (also for zero vectors)."""
    lengths, cosines = lengths_and_cosines(gram_RKK)
    cosine = cosines[:, 0, 1]
    linear = (cosine.abs() > linear_above) | (lengths == 0).any(1)
    angle = torch.acos(cosine.masked_fill(linear, 0.0))
    sine = angle.sin()
    weights = torch.stack([((1 - t) * angle).sin() / sine, (t * angle).sin() / sine], dim=1)
    return torch.where(linear[:, None], torch.tensor([1 - t, t], dtype=weights.dtype), weights)


@METHODS.register("slerp")
class Slerp(Method):
    """Spherical interpolation between two models: `slerp_coefficients` applied to the weights.

    t = 0 is the first model, t = 1 the second (Shoemake 1985; mergekit's `slerp`, where the base
    is the first). As in mergekit the weights are not normalised first: lengths are interpolated
    by the same coefficients. Models of one base usually lie closer than `linear_above` = .9995
    (mergekit's threshold), where SLERP and linear interpolation agree to 2e-4.
    """

    title: ClassVar[str] = "SLERP"
    base: ClassVar[Base] = "ignored"
    models: ClassVar[tuple[int, int | None]] = (2, 2)

    t: Annotated[float, Field(ge=0, le=1)] = 0.5
    vectors: Vectors = "tensor"
    linear_above: Annotated[float, Field(gt=0, le=1)] = 0.9995

    def merge(
        self,
        models: Tensor,
        base: Tensor | None,
        where: TensorInfo,
        state: State,
        extra: Sequence[Tensor] | None = None,
    ) -> Tensor:
        pairs = as_vectors(models, self.vectors)
        coefficients = slerp_coefficients(gram(pairs), self.t, self.linear_above)
        return from_vectors(combine(pairs, coefficients), models.shape[1:], self.vectors)


@METHODS.register("nuslerp")
class NuSlerp(Method):
    """SLERP of two models by weights (t = w_2 / (w_1 + w_2)), of task vectors if a base is given.

    mergekit's `nuslerp`: `nuslerp_flatten: true` is `vectors: tensor`, without it `rows`, with
    `nuslerp_row_wise` also `columns` (vectors along the first dimension). Interpolates linearly
    only where the vectors are parallel to 1e-16.
    """

    title: ClassVar[str] = "NuSLERP"
    base: ClassVar[Base] = "used"
    models: ClassVar[tuple[int, int | None]] = (2, 2)
    per_model: ClassVar[tuple[str, ...]] = ("weight",)

    weight: Weights = 1.0
    vectors: Vectors = "tensor"

    def check(self, count: int, has_base: bool) -> None:
        super().check(count, has_base)
        share_out(self.values("weight", count), self.title)

    def merge(
        self,
        models: Tensor,
        base: Tensor | None,
        where: TensorInfo,
        state: State,
        extra: Sequence[Tensor] | None = None,
    ) -> Tensor:
        t = share_out(self.values("weight", 2), self.title)[1]
        pairs = as_vectors(models if base is None else models.sub_(base), self.vectors)
        coefficients = slerp_coefficients(gram(pairs), t, 1 - 1e-16)
        merged = from_vectors(combine(pairs, coefficients), models.shape[1:], self.vectors)
        return merged if base is None else merged.add_(base)


@METHODS.register("karcher")
class Karcher(Method):
    """The Karcher (Frechet) mean: the point of the sphere from which the weighted directions to
    all models cancel, times the weighted mean of the lengths. SLERP for any number of models.

    Fixed point of m <- exp_m(sum_k w_k log_m(u_k)), u_k = x_k / |x_k| (Karcher 1977), started at
    the normalised weighted mean. For two models of equal length it is SLERP at t = w_2. mergekit's
    `karcher` has equal weights, at most 10 iterations and `tolerance` 1e-5. Models whose tensor is
    zero have no direction and take part in the mean length only; where the directions cancel (two
    opposite models), there is no mean and the first model's direction is taken (mergekit).
    """

    title: ClassVar[str] = "Karcher mean"
    base: ClassVar[Base] = "used"
    per_model: ClassVar[tuple[str, ...]] = ("weight",)

    weight: Weights = 1.0
    vectors: Vectors = "tensor"
    iterations: Annotated[int, Field(ge=0)] = 100
    tolerance: Annotated[float, Field(gt=0)] = 1e-9

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
        weights = share_out(self.values("weight", len(models)), self.title)
        stacked = as_vectors(models if base is None else models.sub_(base), self.vectors)
        coefficients = self._coefficients(gram(stacked), torch.tensor(weights, dtype=torch.float64))
        merged = from_vectors(combine(stacked, coefficients), models.shape[1:], self.vectors)
        return merged if base is None else merged.add_(base)

    def _coefficients(self, gram_RKK: Tensor, weights_K: Tensor) -> Tensor:
        """(R, K) of the mean in terms of the models; the mean is kept as a combination c of the
        unit vectors throughout, so that m . u_j = (cosines c)_j and |m|^2 = c cosines c."""
        lengths, cosines = lengths_and_cosines(gram_RKK)
        there = lengths > 0
        shares = weights_K * there
        shares = shares / shares.sum(1, keepdim=True).clamp(min=1e-300)
        first = torch.zeros_like(shares)
        first.scatter_(1, (there & (weights_K > 0)).to(torch.int8).argmax(1, keepdim=True), 1.0)
        start = _norm(shares, cosines)
        c = torch.where(start < 1e-5, first, shares / start.clamp(min=1e-300))
        for _ in range(self.iterations):
            cosine = torch.einsum("rjk,rk->rj", cosines, c).clamp(-1, 1)
            angle = torch.acos(cosine)
            # angle / sin(angle), 1 at 0; an opposite vector has no direction and is left out
            stretch = torch.where(angle.sin() > 1e-12, angle / angle.sin().clamp(min=1e-12), 1.0)
            pull = shares * stretch * (cosine > -1 + 1e-15)
            tangent = pull - (pull * cosine).sum(1, keepdim=True) * c
            step = _norm(tangent, cosines)
            c = torch.where(
                step < self.tolerance,
                c,
                c * step.cos() + tangent * (step.sin() / step.clamp(min=1e-300)),
            )
            c = c / _norm(c, cosines).clamp(min=1e-300)
            if bool((step < self.tolerance).all()):
                break
        length = (weights_K * lengths).sum(1, keepdim=True)
        return length * c / lengths.masked_fill(~there, 1.0)


@METHODS.register("multislerp")
class MultiSlerp(Method):
    """One step of the Karcher mean with chords for arcs: mergekit's `multislerp`.

    Unit vectors are projected on the tangent space at their normalised weighted mean m, averaged
    there, and brought back by the exponential map. The weighted tangents add up to zero but for
    rounding, so the result is m times the weighted mean of the lengths; unlike `karcher` it is
    not SLERP for two models with unequal weights. Refused where the weighted directions cancel
    (mergekit: an error for more than two, their linear mean for two, which is taken here too).
    """

    title: ClassVar[str] = "Multi-SLERP"
    base: ClassVar[Base] = "used"
    per_model: ClassVar[tuple[str, ...]] = ("weight",)

    weight: Weights = 1.0
    normalize: bool = True

    def check(self, count: int, has_base: bool) -> None:
        super().check(count, has_base)
        if self.normalize:
            share_out(self.values("weight", count), self.title)

    def identity(self, count: int) -> MultiSlerp | None:
        if self.normalize:
            return super().identity(count)
        return self.model_copy(update={"weight": 1 / count})

    def merge(
        self,
        models: Tensor,
        base: Tensor | None,
        where: TensorInfo,
        state: State,
        extra: Sequence[Tensor] | None = None,
    ) -> Tensor:
        values: Sequence[float] = self.values("weight", len(models))
        if self.normalize:
            values = share_out(values, self.title)
        stacked = as_vectors(models if base is None else models.sub_(base), "tensor")
        weights = torch.tensor([values], dtype=torch.float64)
        lengths, cosines = lengths_and_cosines(gram(stacked))
        norm = _norm(weights, cosines)
        if bool((lengths == 0).all()):
            coefficients = weights
        elif float(norm) < 1e-8:
            if len(models) > 2:
                raise MergeError(
                    f"{self.title}: in tensor '{where.name}' the weighted directions of the models "
                    "cancel, so they have no mean on the sphere; change the weights"
                )
            coefficients = weights
        else:
            mean = weights / norm
            along = torch.einsum("rjk,rk->rj", cosines, mean)
            tangent = weights - (weights * along).sum(1, keepdim=True) * mean
            step = _norm(tangent, cosines)
            turned = mean * step.cos() + tangent * torch.where(
                step > 0, step.sin() / step.clamp(min=1e-300), 1.0
            )
            length = (weights * lengths).sum(1, keepdim=True)
            coefficients = length * turned / lengths.masked_fill(lengths == 0, 1.0)
        merged = combine(stacked, coefficients).reshape(models.shape[1:])
        return merged if base is None else merged.add_(base)


@METHODS.register("model_stock")
class ModelStock(Method):
    """theta = theta_0 + t mean_k tau_k, t = K cos w / (1 + (K-1) cos w), w the mean angle between
    task vectors ("Model Stock", Jang et al. 2024, arXiv 2403.19522, equation 5).

    One t for each tensor (`vectors: tensor`, the paper's layers) or for each row (mergekit's
    `filter_wise`). cos w is the mean of the pairwise cosines. Task vectors that oppose each other
    (cos w < 0) are not covered by the paper: the formula is applied as it stands, as mergekit
    does, and the base is kept where its denominator vanishes. Needs two models, since one has no
    angle to anything; K copies give the copy.
    """

    title: ClassVar[str] = "Model stock"
    models: ClassVar[tuple[int, int | None]] = (2, None)

    vectors: Literal["tensor", "rows"] = "tensor"

    def merge(
        self,
        models: Tensor,
        base: Tensor | None,
        where: TensorInfo,
        state: State,
        extra: Sequence[Tensor] | None = None,
    ) -> Tensor:
        origin, count = required(base), len(models)
        deltas = as_vectors(models.sub_(origin), self.vectors)
        _, cosines = lengths_and_cosines(gram(deltas))
        upper = torch.triu_indices(count, count, 1)
        cosine = cosines[:, upper[0], upper[1]].mean(1)
        below = 1 + (count - 1) * cosine
        singular = below.abs() < 1e-6
        t = (count * cosine / below.masked_fill(singular, 1.0)).masked_fill(singular, 0.0)
        coefficients = (t / count)[:, None].expand(-1, count)
        return combine(deltas, coefficients).reshape(origin.shape).add_(origin)


def _norm(c_RK: Tensor, cosines_RKK: Tensor) -> Tensor:
    """(R, 1) length of sum_k c_k u_k."""
    return torch.einsum("rj,rjk,rk->r", c_RK, cosines_RKK, c_RK).clamp(min=0).sqrt()[:, None]
