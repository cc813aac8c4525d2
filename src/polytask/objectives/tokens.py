"""Per-token losses of generation and tagging, and how tokens add up to pairs.

Tokens of all pairs stand in one flat list, `pair` says whose they are. The chunked form scores
hidden states against a large vocabulary without holding all logits at once.

Legend: N tokens, P pairs, D width, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Logits held at once: 2^25 float32 are 128 MiB.
_HELD = 2**25


def token_cross_entropy(
    logits_NV: Tensor, label_N: Tensor, smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(N,) -log p[label], and (N,) log(Z)^2, which keeps logits from drifting (z-loss, Chowdhery
    et al. 2022, arXiv 2204.02311).

    With label smoothing s the target is 1 - s at the label and s / (V - 1) elsewhere, and the
    target's entropy is taken off, so that a perfect prediction costs nothing (T5X): the loss is
    the divergence of the prediction from the target.
    """
    logits = logits_NV.float()
    log_z = torch.logsumexp(logits, -1)
    right = logits.gather(1, label_N[:, None])[:, 0]
    if not smoothing:
        return log_z - right, log_z.square()
    if not 0 < smoothing < 1 or logits.shape[1] < 2:
        raise ValueError(f"label smoothing {smoothing} is not in [0, 1), or there is one token")
    sure, low = 1 - smoothing, smoothing / (logits.shape[1] - 1)
    expected = (sure - low) * right + low * logits.sum(-1)
    entropy = -(sure * math.log(sure) + smoothing * math.log(low))
    return log_z - expected - entropy, log_z.square()


def projected_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    label_N: Tensor,
    bias_V: Tensor | None = None,
    smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`token_cross_entropy` of hidden W' (+ b); above 2^25 logits in chunks that are recomputed in
    the backward pass, so memory does not grow with tokens x vocabulary."""

    def score(hidden: Tensor, label: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return token_cross_entropy(F.linear(hidden, weight, bias_V), label, smoothing)

    size = max(1, _HELD // weight_VD.shape[0])
    if hidden_ND.shape[0] <= size:
        return score(hidden_ND, label_N, weight_VD)
    parts = [
        checkpoint(score, h, y, weight_VD, use_reentrant=False)
        for h, y in zip(torch.split(hidden_ND, size), torch.split(label_N, size), strict=True)
    ]
    nll, z = zip(*parts, strict=True)
    return torch.cat(nll), torch.cat(z)


def per_pair(
    each_N: Tensor,
    pair_N: Tensor,
    pairs: int,
    task_P: Tensor,
    mean: Literal["sequence", "token", "sum"] = "sequence",
    weight_N: Tensor | None = None,
) -> Tensor:
    """(P,) one number per pair, such that the plain mean over a task's pairs is

    sequence  the mean over pairs of each pair's (weighted) token mean;
    token     the (weighted) mean over all tokens of the task in this batch;
    sum       the mean over pairs of each pair's (weighted) sum: long pairs count more.
    """
    weight = torch.ones_like(each_N) if weight_N is None else weight_N.to(each_N.dtype)
    zero = each_N.new_zeros(pairs)
    total = zero.index_add(0, pair_N, each_N * weight)
    if mean == "sum":
        return total
    count = zero.index_add(0, pair_N, weight)
    if mean == "sequence":
        return total / torch.where(count > 0, count, 1.0)
    # Scale each pair's sum by pairs / tokens of its task.
    same = torch.unique(task_P, return_inverse=True)[1]
    tasks = each_N.new_zeros(max(1, pairs))
    tokens = tasks.index_add(0, same, count)[same]
    number = tasks.index_add(0, same, torch.ones_like(total))[same]
    return total * number / torch.where(tokens > 0, tokens, 1.0)
