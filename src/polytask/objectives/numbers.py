"""Losses over numbers: regression in standardised units, and forecasts in each series' own scale.

NaN in a target means unknown; the mean is over what is known. Everything in float32.

Legend: P pairs, O outputs, H horizon, C channels, Q quantile levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from polytask.objectives.classes import known_mean

Shape = Literal["mse", "mae", "huber"]


def distance(prediction: Tensor, target: Tensor, shape: Shape) -> Tensor:
    """Elementwise: squared, absolute, or Huber's (quadratic below 1, Huber 1964)."""
    if shape == "mse":
        return (prediction - target).square()
    if shape == "mae":
        return (prediction - target).abs()
    return F.huber_loss(prediction, target, reduction="none")


def regression(
    prediction_PO: Tensor, target_PO: Tensor, mean_PO: Tensor, std_PO: Tensor, shape: Shape = "mse"
) -> Tensor:
    """(P,) distance between a prediction in standardised units and a target in raw units."""
    known = ~target_PO.isnan()
    target = (target_PO.float() - mean_PO) / std_PO
    each = distance(prediction_PO.float(), target.nan_to_num(0.0), shape)
    return known_mean(each, known)


def forecast(
    prediction_PHC: Tensor,
    target_PHC: Tensor,
    loc_PC: Tensor,
    scale_PC: Tensor,
    shape: Shape = "huber",
) -> Tensor:
    """(P,) distance in units of each series' own scale: prediction is standardised, target raw."""
    known = ~target_PHC.isnan()
    target = (target_PHC.float() - loc_PC[:, None]) / scale_PC[:, None]
    each = distance(prediction_PHC.float(), torch.where(known, target, target.new_zeros(())), shape)
    return known_mean(each, known)


def raw_forecast(
    prediction_PHC: Tensor,
    target_PHC: Tensor,
    shape: Shape = "mse",
    scale_PC: Tensor | None = None,
) -> Tensor:
    """(P,) distance between a forecast and a target that are both in the units of the series.

    Without `scale_PC` a channel of large scale dominates; with it the error is divided by it.
    """
    known = ~target_PHC.isnan()
    target = torch.where(known, target_PHC.float(), prediction_PHC.detach().float())
    unit = 1.0 if scale_PC is None else scale_PC[:, None]
    return known_mean(distance(prediction_PHC.float() / unit, target / unit, shape), known)


def pinball(
    quantiles_PHCQ: Tensor,
    target_PHC: Tensor,
    levels: Sequence[float],
    scale_PC: Tensor | None = None,
) -> Tensor:
    """(P,) mean over known steps and levels q of max(q e, (q - 1) e), e = target - quantile.

    Its minimum is the q-quantile. Source: Koenker and Bassett 1978.
    """
    known = ~target_PHC.isnan()
    quantiles = quantiles_PHCQ.float()
    target = torch.where(known, target_PHC.float(), target_PHC.new_zeros(()))
    error = target.unsqueeze(-1) - quantiles
    if scale_PC is not None:
        error = error / scale_PC[:, None, :, None]
    q = torch.tensor(levels, device=error.device)
    each = torch.maximum(q * error, (q - 1) * error).mean(-1)
    return known_mean(each, known)
