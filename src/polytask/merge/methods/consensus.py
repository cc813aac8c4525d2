"""How thinned task vectors become one: a weighted sum, or a vote on each coordinate's sign first.

Shared by the methods that thin task vectors (TIES, DARE, breadcrumbs, DELLA). Everything runs over
blocks that fit the processor's cache and in the memory of the task vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from polytask.configs import Config
from polytask.errors import ConfigError
from polytask.merge.method import (
    Finite,
    Fractions,
    Method,
    State,
    TensorInfo,
    Weights,
    required,
    weighted_sum,
)
from polytask.merge.methods.averages import share_out
from polytask.merge.select import blocks

Divide = Literal["weights", "counts", "none"]


class Vote(Config):
    """Options of sign election (TIES, Yadav et al. 2023, arXiv 2306.01708, section 4).

    Attributes:
        by: 'mass' elects the sign of the sum of the task vectors (the paper; PEFT's 'total'),
            'count' the sign that more of them have (PEFT's 'frequency').
        weigh: multiply by the weights 'before' the vote (mergekit) or only 'after' it (PEFT).
        divide: divide the sum of those who agree by the sum of their 'weights' (mergekit with
            `normalize: true`), by how many they are ('counts': the paper, PEFT), or by nothing
            ('none': mergekit with `normalize: false`). Equal when all weights are 1.
        draw: sign of a coordinate whose vote is a draw: 'positive' (mergekit, PEFT), or that of
            the 'majority' of all elected signs in the model (the paper's code; needs one more
            pass over the tensors).
    """

    by: Literal["mass", "count"] = "mass"
    weigh: Literal["before", "after"] = "before"
    divide: Divide = "weights"
    draw: Literal["positive", "majority"] = "positive"


class Thinned(Method):
    """Base of the methods that make task vectors sparse first: theta_0 + scale * join(thin(tau)).

    A subclass implements `thinned`. `vote` elects signs (TIES); without it the join is the
    weighted sum, divided by the sum of the weights with `normalize`.
    """

    per_model: ClassVar[tuple[str, ...]] = ("weight", "density")

    weight: Weights = 1.0
    density: Fractions = 0.2
    scale: Finite = 1.0
    vote: Vote | None = None
    normalize: bool = False

    @property
    def passes(self) -> tuple[str, ...]:
        return ("elected signs",) if self.vote and self.vote.draw == "majority" else ()

    @property
    def local(self) -> frozenset[str]:
        return frozenset(type(self).model_fields) - {"vote"}

    def check(self, count: int, has_base: bool) -> None:
        super().check(count, has_base)
        values = self.values("weight", count)
        if self.vote is None:
            if self.normalize:
                share_out(values, self.title)
            return
        if self.normalize:
            raise ConfigError(f"{self.title}: with a vote, 'vote: divide' says what to divide by")
        if self.vote.divide == "weights" and (min(values) < 0 or max(values) == 0):
            raise ConfigError(
                f"{self.title}: dividing by the weights of those who agree needs weights that are "
                f"not negative and not all zero, got {list(values)}; set 'divide' of 'vote' to "
                "'counts' or 'none'"
            )

    def identity(self, count: int) -> Thinned | None:
        divided = self.normalize if self.vote is None else self.vote.divide != "none"
        whole = {"weight": 1.0 if divided else 1 / count, "density": 1.0, "scale": 1.0}
        cut = super().identity(count)
        return None if cut is None else cut.model_copy(update=whole)

    def thinned(self, deltas: Tensor, where: TensorInfo, state: State) -> Tensor:
        """(K, *shape) the sparse task vectors, in the memory of `deltas`."""
        raise NotImplementedError

    def measure(
        self, number: int, models: Tensor, base: Tensor | None, where: TensorInfo, state: State
    ) -> Any:
        deltas = self.thinned(models.sub_(required(base)), where, state)
        return elected_balance(deltas, self.values("weight", len(deltas)), self.vote or Vote())

    def combine(self, number: int, one: Any, other: Any) -> Any:
        return one + other

    def finish(self, number: int, total: Any, state: State, names: Sequence[str]) -> State:
        return {**state, "draw": (total > 0) - (total < 0)}

    def merge(
        self,
        models: Tensor,
        base: Tensor | None,
        where: TensorInfo,
        state: State,
        extra: Sequence[Tensor] | None = None,
    ) -> Tensor:
        origin = required(base)
        deltas = self.thinned(models.sub_(origin), where, state)
        values: Sequence[float] = self.values("weight", len(deltas))
        if self.vote is not None:
            merged = elect(deltas, values, self.vote, state.get("draw", 1))
            return merged.mul_(self.scale).add_(origin)
        if self.normalize:
            values = share_out(values, self.title)
        return weighted_sum(deltas, [self.scale * value for value in values]).add_(origin)


def elected_balance(deltas: Tensor, values: Sequence[float], vote: Vote) -> int:
    """How many coordinates elect plus, less how many elect minus; for `draw='majority'`.

    `deltas` (K, *shape), contiguous, is overwritten.
    """
    flat, balance = deltas.view(len(deltas), -1), 0
    for block in blocks(flat.shape[1]):
        ballot = _ballot(_weighed(flat[:, block], values, vote), vote)
        balance += int(ballot.sign_().sum(dtype=torch.float64))
    return balance


def elect(deltas: Tensor, values: Sequence[float], vote: Vote, draw: int = 1) -> Tensor:
    """Sum or mean, coordinate by coordinate, of the task vectors that have the elected sign.

    Args:
        deltas: (K, *shape) contiguous; overwritten.
        values: the K weights.
        vote: the options.
        draw: sign taken where the vote is a draw (1 or -1; 0: the negative entries, as the
            paper's code does when all elected signs of a model balance out).

    Returns:
        (*shape), in the memory of the first task vector. 0 where nobody has the elected sign.
    """
    flat = deltas.view(len(deltas), -1)
    late = vote.weigh == "after"
    for block in blocks(flat.shape[1]):
        piece = _weighed(flat[:, block], values, vote)
        sign = _elected_sign(_ballot(piece, vote), draw)
        total, divisor = torch.zeros_like(sign), torch.zeros_like(sign)
        for row, value in zip(piece, values, strict=True):
            row.mul_(sign).clamp_(min=0)  # those who disagree become 0
            total.add_(row, alpha=value if late else 1.0)
            if vote.divide != "none":
                divisor.add_(row.sign_(), alpha=value if vote.divide == "weights" else 1.0)
        if vote.divide != "none":
            # Where nobody agrees the sum is 0, and stays 0 whatever positive number divides it.
            total.div_(divisor.clamp_(min=torch.finfo(divisor.dtype).tiny))
        torch.mul(total, sign, out=flat[0, block])
    return deltas[0]


def keep_elected_(deltas: Tensor, vote: Vote, draw: int) -> Tensor:
    """Zero every entry that has not the elected sign, in place; task vectors stay separate.

    `deltas` is (K, *shape), contiguous; all vote with weight 1.
    """
    flat = deltas.view(len(deltas), -1)
    for block in blocks(flat.shape[1]):
        piece = flat[:, block]
        sign = _elected_sign(_ballot(piece, vote), draw)
        piece.mul_(sign).clamp_(min=0).mul_(sign)
    return deltas


def _weighed(piece: Tensor, values: Sequence[float], vote: Vote) -> Tensor:
    if vote.weigh == "before":
        for row, value in zip(piece, values, strict=True):
            if value != 1:
                row.mul_(value)
    return piece


def _ballot(piece: Tensor, vote: Vote) -> Tensor:
    """(B,) the sum whose sign is elected, added up in the order of the models."""
    total = torch.zeros_like(piece[0])
    for row in piece:
        total.add_(row.sign() if vote.by == "count" else row)
    return total


def _elected_sign(ballot: Tensor, draw: int) -> Tensor:
    """(B,) of -1 and 1, in the memory of `ballot`."""
    # Comparisons written as numbers: torch takes ten times as long to turn booleans into numbers.
    return (ballot.ge_(0) if draw > 0 else ballot.gt_(0)).mul_(2).sub_(1)
