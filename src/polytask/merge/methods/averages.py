"""Weighted sums of weights or of task vectors: the oldest merges, and the baselines of the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor

from polytask.errors import ConfigError
from polytask.merge.method import (
    METHODS,
    Finite,
    Method,
    State,
    TensorInfo,
    Weights,
    required,
    weighted_sum,
)


def share_out(values: Sequence[float], title: str) -> list[float]:
    """Weights divided by their sum; `ConfigError` if that is zero."""
    total = float(sum(values))
    if abs(total) < 1e-8:
        raise ConfigError(
            f"{title}: the weights {list(values)} add up to zero and cannot be normalised; "
            "change them or set 'normalize: false'"
        )
    return [value / total for value in values]


@METHODS.register("average")
class Average(Method):
    """theta = (1/K) sum_k theta_k ("Model soups", Wortsman et al. 2022, arXiv 2203.05482)."""

    title: ClassVar[str] = "Average"
    base: ClassVar[Literal["needed", "used", "ignored"]] = "ignored"

    @property
    def elementwise(self) -> bool:
        return True

    def merge(
        self,
        models: Tensor,
        base: Tensor | None,
        where: TensorInfo,
        state: State,
        extra: Sequence[Tensor] | None = None,
    ) -> Tensor:
        return weighted_sum(models, [1.0] * len(models)).div_(len(models))


@METHODS.register("linear")
class Linear(Method):
    """theta = sum_k w_k theta_k, with weights divided by their sum unless `normalize` is off.

    mergekit's `linear`. Without normalisation the weights need not add up to one and the result
    may leave the models' region.
    """

    title: ClassVar[str] = "Linear"
    base: ClassVar[Literal["needed", "used", "ignored"]] = "ignored"
    per_model: ClassVar[tuple[str, ...]] = ("weight",)

    weight: Weights = 1.0
    normalize: bool = True

    @property
    def elementwise(self) -> bool:
        return True

    def check(self, count: int, has_base: bool) -> None:
        super().check(count, has_base)
        if self.normalize:
            share_out(self.values("weight", count), self.title)

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
        return weighted_sum(models, values)


@METHODS.register("task_arithmetic")
class TaskArithmetic(Method):
    """theta = theta_0 + scale sum_k w_k tau_k (Ilharco et al. 2023, arXiv 2212.04089, section 2).

    mergekit's `task_arithmetic` (its `lambda` is `scale`); `normalize` divides by the sum of the
    weights, as there. Negative weights forget a task (equation 'negation' of the paper).
    """

    title: ClassVar[str] = "Task arithmetic"
    per_model: ClassVar[tuple[str, ...]] = ("weight",)

    weight: Weights = 0.3
    scale: Finite = 1.0
    normalize: bool = False

    @property
    def elementwise(self) -> bool:
        return True

    def check(self, count: int, has_base: bool) -> None:
        super().check(count, has_base)
        if self.normalize:
            share_out(self.values("weight", count), self.title)

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
        origin = required(base)
        deltas = models.sub_(origin)
        return weighted_sum(deltas, [self.scale * value for value in values]).add_(origin)
