"""Per-pixel losses: cross entropy over classes, absolute error over values; NaN = unknown.

Legend: P pairs, C classes, Y height, X width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from polytask.objectives.classes import known_mean


def dense_cross_entropy(logits_PCYX: Tensor, target_PYX: Tensor) -> Tensor:
    """(P,) mean over known pixels; targets are class numbers as floats."""
    known = ~target_PYX.isnan()
    label = target_PYX.nan_to_num(0.0).long()
    each = F.cross_entropy(logits_PCYX.float(), label, reduction="none")
    return known_mean(each, known)


def dense_absolute(prediction_PYX: Tensor, target_PYX: Tensor) -> Tensor:
    """(P,) mean absolute error over known pixels."""
    known = ~target_PYX.isnan()
    each = (prediction_PYX.float() - torch.nan_to_num(target_PYX.float())).abs()
    return known_mean(each, known)
