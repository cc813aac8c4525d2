"""Weighted sums of weights or of task vectors: the oldest merges, and the baselines of the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field
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

Base = Literal["needed", "used", "ignored"]


def share_out(values: Sequence[float], title: str) -> list[float]:
    """Weights divided by their sum; `ConfigError` if that is zero."""
    total = float(sum(values))
    if abs(total) < 1e-8:
        raise ConfigError(
            f"{title}: the weights {list(values)} add up to zero and cannot be normalised; "
            "change them or set 'normalize: false'"
        )
    return [value / total for value in values]


def positive(values: Sequence[float], title: str) -> None:
    """`ConfigError` for weights that are negative or all zero."""
    if min(values) < 0 or max(values) == 0:
        raise ConfigError(
            f"{title}: weights must not be negative, nor all zero, got {list(values)}"
        )


@METHODS.register("average")
class Average(Method):
    """theta = (1/K) sum_k theta_k ("Model soups", Wortsman et al. 2022, arXiv 2203.05482)."""

    title: ClassVar[str] = "Average"
    base: ClassVar[Base] = "ignored"

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
    base: ClassVar[Base] = "ignored"
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

    def identity(self, count: int) -> Linear | None:
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

    def identity(self, count: int) -> TaskArithmetic | None:
        weight = 1.0 if self.normalize else 1 / count
        return self.model_copy(update={"weight": weight, "scale": 1.0})

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


@METHODS.register("ema")
class EMA(Method):
    """Exponential moving average of checkpoints in the order of training:
    m_1 = theta_1, m_k = decay m_(k-1) + (1 - decay) theta_k.

    In closed form theta_k has weight (1 - decay) decay^(K-k), and the first decay^(K-1): a
    weighted sum like any other, so that the checkpoints of a finished run can be averaged with
    several decays without training again (Polyak & Ruppert's averaging with a horizon).
    """

    title: ClassVar[str] = "EMA"
    base: ClassVar[Base] = "ignored"

    decay: Annotated[float, Field(ge=0, lt=1)] = 0.9

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
        return weighted_sum(models, ema_weights(len(models), self.decay))


def ema_weights(count: int, decay: float) -> list[float]:
    """Weights of an exponential moving average of `count` checkpoints, oldest first; sum 1."""
    newer = [(1 - decay) * decay ** (count - k) for k in range(2, count + 1)]
    return [decay ** (count - 1), *newer]


@METHODS.register("ratatouille")
class Ratatouille(Method):
    """Average of averages: checkpoints of one training first, then the trainings with equal weight
    ("Model Ratatouille", Rame et al. 2023, arXiv 2212.10445: fine-tunings that start from
    different auxiliary tasks' weights are averaged).

    `runs` has the training that each model belongs to, by any names; without it every model is a
    training of its own (the paper's uniform form). `inside` averages a training's checkpoints
    plainly ('mean') or as an `ema` with `decay`, in the order given. A training counts once
    however many checkpoints it left.
    """

    title: ClassVar[str] = "Model ratatouille"
    base: ClassVar[Base] = "ignored"

    runs: tuple[str, ...] | None = None
    inside: Literal["mean", "ema"] = "mean"
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.9

    @property
    def elementwise(self) -> bool:
        return True

    def check(self, count: int, has_base: bool) -> None:
        super().check(count, has_base)
        if self.runs is not None and len(self.runs) != count:
            raise ConfigError(
                f"{self.title}: 'runs' names the training of each model; it has "
                f"{len(self.runs)} names for {count} models"
            )

    def identity(self, count: int) -> Ratatouille | None:
        runs = self.runs if self.runs is None or len(self.runs) == count else None
        return self.model_copy(update={"runs": runs})

    def weights(self, count: int) -> list[float]:
        """(K,) weights that add up to one."""
        runs = self.runs or tuple(str(number) for number in range(count))
        found = [0.0] * count
        for run in set(runs):
            places = [place for place, name in enumerate(runs) if name == run]
            size = len(places)
            shares = ema_weights(size, self.decay) if self.inside == "ema" else [1 / size] * size
            for place, share in zip(places, shares, strict=True):
                found[place] = share / len(set(runs))
        return found

    def merge(
        self,
        models: Tensor,
        base: Tensor | None,
        where: TensorInfo,
        state: State,
        extra: Sequence[Tensor] | None = None,
    ) -> Tensor:
        return weighted_sum(models, self.weights(len(models)))
