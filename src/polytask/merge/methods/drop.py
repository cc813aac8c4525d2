"""DARE and DELLA: drop entries of task vectors at random and make up for it by rescaling the rest.

"Language Models are Super Mario" (DARE: Yu et al. 2023, arXiv 2311.03099) drops all with one
chance; "DELLA-Merging" (Deep et al. 2024, arXiv 2406.11617) drops small entries more often. Masks
are functions of (seed, model's name, tensor's name, place): the same in any order of work.

Random by design: one expert at weight 1 gives that expert at density 1; below, every coordinate is
the base's or the base's plus the rescaled change, and the mean over seeds is the expert.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from polytask.errors import ConfigError
from polytask.merge import select
from polytask.merge.method import METHODS, Fractions, State, TensorInfo
from polytask.merge.methods.consensus import Thinned, Vote

Rescale = Literal["density", "l1", "none"]
Epsilon = Annotated[float, Field(ge=0, lt=0.5)]


def drop_(delta: Tensor, density: float, rescale: Rescale, where: TensorInfo, model: str) -> Tensor:
    """Keep each entry with chance `density` and rescale the rest, in place (DARE, section 3.2).

    `rescale`: 'density' divides by the density (the paper, PEFT), which keeps the expectation;
    'l1' makes up for the L1 norm that this tensor lost (mergekit); 'none' leaves it smaller.
    """
    if density >= 1 or not delta.numel():
        return delta
    before = select.mass(delta) if rescale == "l1" else 0.0
    words = select.uniform_words(delta.numel(), where.offset, where.seed, "drop", model, where.name)
    limit = round(density * 2**32)
    factor = 1 / density if rescale == "density" else 1.0
    flat = delta.view(-1)
    for block in select.blocks(flat.numel()):
        mask = np.multiply(words[block] < limit, np.float32(factor), dtype=np.float32)
        flat[block].mul_(torch.from_numpy(mask).to(flat))
    return _match_mass_(delta, before) if rescale == "l1" else delta


def rank_drop_(
    delta: Tensor, density: float, epsilon: float, rescale: Rescale, where: TensorInfo, model: str
) -> Tensor:
    """MagPrune, in place: within each row the chance to stay rises linearly with the rank of the
    magnitude, from density - epsilon to density + epsilon (DELLA, section 3.1).

    `rescale`: 'density' divides what stays by its own chance (the paper); the others as `drop_`.
    A vector is one row, and so is a kernel of a convolution; a lone entry has chance `density`.
    """
    if density >= 1 or not delta.numel():
        return delta
    before = select.mass(delta) if rescale == "l1" else 0.0
    rows = delta.view(1, -1) if delta.dim() < 2 else delta.view(len(delta), -1)
    width = rows.shape[1]
    steps = torch.linspace(-epsilon, epsilon, width) if width > 1 else torch.zeros(1)
    ladder = steps.add_(density).to(rows.device)
    order = rows.abs().argsort(dim=1, stable=True)
    chance = torch.empty_like(rows, dtype=torch.float32)
    chance.scatter_(1, order, ladder.expand_as(order))
    draws = select.uniform(delta.numel(), where.offset, where.seed, "rank", model, where.name)
    rows.mul_(draws.to(rows.device).view_as(chance).lt_(chance))  # 1 where it stays, else 0
    if rescale == "density":
        rows.div_(chance)
    return _match_mass_(delta, before) if rescale == "l1" else delta


def _match_mass_(delta: Tensor, before: float) -> Tensor:
    after = select.mass(delta)
    return delta.mul_(before / after) if after > 0 else delta  # all dropped: nothing to rescale


@METHODS.register("dare_linear")
class DareLinear(Thinned):
    """theta = theta_0 + scale sum_k w_k m_k tau_k / density, m_k a random mask of that density.

    `rescale` see `drop_`; mergekit's `dare_linear` is `rescale: l1`. PEFT's is the default here.
    """

    title: ClassVar[str] = "DARE"

    rescale: Rescale = "density"

    @property
    def elementwise(self) -> bool:
        return self.rescale != "l1"

    def thinned(self, deltas: Tensor, where: TensorInfo, state: State) -> Tensor:
        return _dropped(deltas, self.values("density", len(deltas)), self.rescale, where)


@METHODS.register("dare_ties")
class DareTies(Thinned):
    """DARE's random masks, then the sign election and the mean of TIES (DARE, section 3.3).

    `rescale` see `drop_`, `vote` see `consensus.Vote`. mergekit's `dare_ties` is `rescale: l1,
    vote: {divide: none}`; PEFT's is `vote: {weigh: after, divide: counts}`.
    """

    title: ClassVar[str] = "DARE-TIES"

    rescale: Rescale = "density"
    vote: Vote | None = Vote()

    @property
    def elementwise(self) -> bool:
        return self.rescale != "l1"

    def thinned(self, deltas: Tensor, where: TensorInfo, state: State) -> Tensor:
        return _dropped(deltas, self.values("density", len(deltas)), self.rescale, where)


def _dropped(
    deltas: Tensor, densities: tuple[float, ...], rescale: Rescale, where: TensorInfo
) -> Tensor:
    for row, density, model in zip(deltas, densities, where.models, strict=True):
        drop_(row, density, rescale, where, model)
    return deltas


class _Della(Thinned):
    per_model: ClassVar[tuple[str, ...]] = ("weight", "density", "epsilon")

    density: Fractions = 0.5
    epsilon: Epsilon | tuple[Epsilon, ...] = 0.15
    rescale: Rescale = "density"

    def check(self, count: int, has_base: bool) -> None:
        super().check(count, has_base)
        spreads = self.values("epsilon", count)
        for density, epsilon in zip(self.values("density", count), spreads, strict=True):
            if density < 1 and not (epsilon < density and density + epsilon < 1):
                raise ConfigError(
                    f"{self.title}: chances run from density - epsilon to density + epsilon, "
                    f"{density - epsilon:g} to {density + epsilon:g}; they must lie between 0 and 1"
                )

    def thinned(self, deltas: Tensor, where: TensorInfo, state: State) -> Tensor:
        count = len(deltas)
        pairs = zip(self.values("density", count), self.values("epsilon", count), strict=True)
        for row, (density, epsilon), model in zip(deltas, pairs, where.models, strict=True):
            rank_drop_(row, density, epsilon, self.rescale, where, model)
        return deltas


@METHODS.register("della_linear")
class DellaLinear(_Della):
    """theta = theta_0 + scale sum_k w_k MagPrune(tau_k), see `rank_drop_`.

    mergekit's `della_linear` is `rescale: l1`, its `epsilon` the same half width.
    """

    title: ClassVar[str] = "DELLA without election"


@METHODS.register("della")
class Della(_Della):
    """MagPrune (`rank_drop_`), then the sign election and the mean of TIES (DELLA, section 3).

    mergekit's `della` is `rescale: l1`.
    """

    title: ClassVar[str] = "DELLA"

    vote: Vote | None = Vote()
