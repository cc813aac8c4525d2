"""Losses over classes: one of several (cross entropy), and several at once (binary).

All take logits of any float type, compute in float32 and return one number per pair. Classes beyond
a pair's own are marked by logits of minus infinity (`mask_classes`), because tasks with different
numbers of classes share a batch.

Legend: P pairs, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def mask_classes(logits_PC: Tensor, classes_P: Tensor) -> Tensor:
    """Minus infinity beyond the first `classes` columns of each row."""
    column = torch.arange(logits_PC.shape[1], device=logits_PC.device)
    return logits_PC.masked_fill(column >= classes_P[:, None], float("-inf"))


def cross_entropy(logits_PC: Tensor, target_P: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """(P,) -(1 - s) log p[target] - s mean_c log p[c] over the classes with finite logits
    (smoothing: Szegedy et al. 2016, arXiv 1512.00567)."""
    if not label_smoothing:
        return F.cross_entropy(logits_PC.float(), target_P, reduction="none")
    real = logits_PC != float("-inf")
    log_p = torch.log_softmax(logits_PC.float(), -1)
    own = -log_p.gather(1, target_P[:, None])[:, 0]
    others = -log_p.masked_fill(~real, 0.0).sum(1) / real.sum(1)
    return (1 - label_smoothing) * own + label_smoothing * others


def binary_cross_entropy(logits_PC: Tensor, target_PC: Tensor) -> Tensor:
    """(P,) mean over the known labels of a pair; NaN in `target` is unknown. 0 if all are."""
    known = ~target_PC.isnan()
    each = F.binary_cross_entropy_with_logits(
        logits_PC.float(), target_PC.nan_to_num(0.0).float(), reduction="none"
    )
    return known_mean(each, known)


def known_mean(each: Tensor, known: Tensor) -> Tensor:
    """(P,) mean of `each` (P, ...) over `known`; 0 where nothing is."""
    # `where` rather than a product: what stands at an unknown place may be NaN or infinite.
    total = torch.where(known, each, each.new_zeros(())).flatten(1).sum(1)
    return total / known.flatten(1).sum(1).clamp(min=1)


def entropy(logits_PC: Tensor) -> Tensor:
    """(P,) -sum_c p_c log p_c in nats, over the classes with finite logits.

    By log-softmax: log(softmax) is minus infinity where a probability underflows. Classes masked
    with minus infinity count nothing; NaN in a row stays NaN.
    """
    real = logits_PC != float("-inf")
    log_p = torch.log_softmax(
        logits_PC.float() if logits_PC.dtype != torch.float64 else logits_PC, -1
    )
    return -torch.where(real, log_p.exp() * log_p.masked_fill(~real, 0.0), 0.0).sum(-1)
