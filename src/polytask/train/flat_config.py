"""The settings of `FlatMTL`, apart from its code: reading a configuration needs no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from polytask.configs import Config

Norm = Literal["joint", "split"]
Ascent = Literal["per_task", "summed"]
Aggregation = Literal["split", "direct"]


class SharpnessConfig(Config):
    """How the trainer looks for flat regions; `train.aggregator` combines what it finds.

    rho: radius of the ascent; .05 to .3 for weights of ordinary size, about 2 with `adaptive`.
    adaptive: scale the radius by each weight's size. norm: one norm over shared and head gradients
    together, or one each. ascent: 'summed' climbs once, along the summed loss (ordinary SAM).
    aggregation: 'direct' combines the gradients found uphill without splitting them.
    """

    rho: float = Field(default=0.05, ge=0, allow_inf_nan=False)
    adaptive: bool = False
    norm: Norm = "joint"
    ascent: Ascent = "per_task"
    aggregation: Aggregation = "split"
