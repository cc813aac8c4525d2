"""Breadcrumbs: drop the largest changes along with the small ones.

"Model Breadcrumbs" (Davari & Belilovsky 2023, arXiv 2312.06795): the few largest changes of a
layer are outliers that disturb other tasks, the many small ones are noise; a band between stays.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from polytask.merge import select
from polytask.merge.method import METHODS, Fractions, State, TensorInfo
from polytask.merge.methods.consensus import Thinned, Vote

Outliers = Annotated[float, Field(ge=0, lt=1)]


def keep_band_(delta: Tensor, density: float, gamma: float) -> Tensor:
    """Zero the `gamma` largest magnitudes and so many small ones that `density` stay, in place.

    With n entries int(gamma n) go at the top and n - int(density n) - int(gamma n) at the bottom;
    when gamma + density > 1, fewer go at the top, so that the density is met (mergekit). Of equal
    magnitudes at a threshold all stay.
    """
    count = delta.numel()
    wanted = int(density * count)
    if density >= 1 or not wanted:
        return delta if density >= 1 else delta.zero_()
    bottom = max(0, count - wanted - int(gamma * count))
    lower, upper = select.kth_magnitudes(delta, bottom, bottom + wanted - 1)
    select.zero_below_(delta, lower)
    if bottom + wanted < count:
        flat = delta.view(-1)
        for block in select.blocks(count):
            piece = flat[block]
            piece.mul_(piece.abs().float().le_(upper))
    return delta


class _Breadcrumbs(Thinned):
    per_model: ClassVar[tuple[str, ...]] = ("weight", "density", "gamma")

    density: Fractions = 0.14
    gamma: Outliers | tuple[Outliers, ...] = 0.01

    def thinned(self, deltas: Tensor, where: TensorInfo, state: State) -> Tensor:
        count = len(deltas)
        pairs = zip(self.values("density", count), self.values("gamma", count), strict=True)
        for row, (density, gamma) in zip(deltas, pairs, strict=True):
            keep_band_(row, density, gamma)
        return deltas


@METHODS.register("breadcrumbs")
class Breadcrumbs(_Breadcrumbs):
    """theta = theta_0 + scale sum_k w_k band(tau_k), see `keep_band_`. mergekit's `breadcrumbs`.

    The paper's beta (fraction dropped at the bottom) is 1 - density - gamma; its settings
    beta .85, gamma .01 are the defaults. One expert at weight 1 gives that expert at density 1.
    """

    title: ClassVar[str] = "Breadcrumbs"


@METHODS.register("breadcrumbs_ties")
class BreadcrumbsTies(_Breadcrumbs):
    """Breadcrumbs' band, then the sign election of TIES; mergekit's `breadcrumbs_ties` is
    `vote: {divide: none}`."""

    title: ClassVar[str] = "Breadcrumbs with TIES"

    vote: Vote | None = Vote()
