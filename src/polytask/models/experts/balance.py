"""Losses that keep experts in use. Each is a function of what routers said; all in float32.

M3ViT and V-MoE: CV^2(importance) + CV^2(load) per router and task. Pooling tasks first would hide
a task whose tokens all go to one expert while others happen to fill the rest, so tasks are kept
apart: every function gives a value per task.

Legend: M tokens, N experts, K chosen ones, T tasks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from polytask.models.experts.routers import RouterOutput


@dataclass(frozen=True)
class BalanceWeights:
    """Weights of the terms of `balance_loss`; 0 leaves a term out."""

    importance: float = 1.0
    load: float = 1.0
    switch: float = 0.0
    z: float = 0.0


def balance_loss(
    routed: RouterOutput,
    tasks: int,
    weights: BalanceWeights = BalanceWeights(),
    published_load: bool = False,
) -> Tensor:
    """(T,) float32; 0 for tasks without a token here. Tokens of unknown task count as task 0."""
    total = routed.probability.new_zeros(tasks)
    if weights.importance:
        total = total + weights.importance * cv_squared(importance(routed, tasks))
    if weights.load:
        total = total + weights.load * cv_squared(load(routed, tasks, published_load))
    if weights.switch:
        total = total + weights.switch * switch_loss(routed, tasks)
    if weights.z:
        total = total + weights.z * z_loss(routed, tasks)
    return total


def cv_squared(value_TN: Tensor) -> Tensor:
    """(T,) var(v) / (mean(v)^2 + 1e-10), variance unbiased: 0 when all experts have the same."""
    if value_TN.shape[1] == 1:
        return value_TN.sum(1) * 0.0
    return value_TN.var(1) / (value_TN.mean(1).square() + 1e-10)


def importance(routed: RouterOutput, tasks: int) -> Tensor:
    """(T, N) the weights that each expert was given, summed over tokens."""
    weight = routed.weight if routed.kept is None else routed.weight * routed.kept
    dense = torch.zeros_like(routed.probability).scatter(1, routed.index, weight)
    return _by_task(dense, routed, tasks)


def load(routed: RouterOutput, tasks: int, published: bool = False) -> Tensor:
    """(T, N) expected number of tokens at each expert.

    With noise it is smooth: P(expert in the top K) = Phi((clean - threshold) / std), where the
    threshold is the (K+1)-th noisy logit for an expert in the top K and the K-th for the others
    (Shazeer et al. 2017, arXiv 1701.06538, eq. 8-10). Without noise it is the count of weights
    above 0, which has no gradient.

    `published`: thresholds after the softmax, compared with logits before it, as the authors' code
    does; its probabilities mean nothing in particular.
    """
    experts, k = routed.probability.shape[1], routed.index.shape[1]
    if routed.noise_std == 0 or k == experts:
        used = routed.weight.detach() > 0
        if routed.kept is not None:
            used = used & routed.kept
        dense = torch.zeros_like(routed.clean).scatter(1, routed.index, used.float())
        return _by_task(dense, routed, tasks)
    ranked = routed.probability if published else routed.noisy
    top = ranked.topk(k + 1, dim=1).values
    inside, outside = top[:, k : k + 1], top[:, k - 1 : k]
    threshold = torch.where(routed.noisy > inside, inside, outside)
    finite = routed.noisy.isfinite()  # experts that a task may not use are never chosen
    distance = (routed.clean - threshold) / routed.noise_std
    chance = torch.special.ndtr(distance.masked_fill(~finite, float("-inf")))
    return _by_task(chance, routed, tasks)


def switch_loss(routed: RouterOutput, tasks: int) -> Tensor:
    """(T,) N * sum over experts of (share of pairs) * (mean probability): 1 when even.

    Source: Fedus et al. 2022, arXiv 2101.03961, eq. 4-6.
    """
    experts = routed.probability.shape[1]
    kept = torch.ones_like(routed.weight) if routed.kept is None else routed.kept.float()
    chosen = torch.zeros_like(routed.probability).scatter(1, routed.index, kept)
    pairs = _by_task(chosen, routed, tasks)
    share = pairs / pairs.sum(1, keepdim=True).clamp(min=1)
    tokens = _tokens(routed, tasks).clamp(min=1)
    mean = _by_task(routed.probability, routed, tasks) / tokens[:, None]
    return experts * (share * mean).sum(1)


def z_loss(routed: RouterOutput, tasks: int) -> Tensor:
    """(T,) mean of logsumexp(logits)^2 (Zoph et al. 2022, arXiv 2202.08906, eq. 5)."""
    finite = routed.clean.masked_fill(~routed.noisy.isfinite(), float("-inf"))
    square = finite.logsumexp(1).square()[:, None]
    return _by_task(square, routed, tasks)[:, 0] / _tokens(routed, tasks).clamp(min=1)


def mutual_information(table_TN: Tensor, eps: float = 0.0) -> Tensor:
    """() I(T; E) in nats of a joint distribution over tasks and experts (sums to 1).

    H(E) - H(E | T): large when experts are used evenly over all and each task uses few. With
    `eps` it is Mod-Squad's guarded form P log(P / (P(t) P(e)) + eps) (arXiv 2212.08066).
    """
    joint = table_TN.float()
    outer = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    ratio = torch.where(joint > 0, joint / outer.clamp(min=1e-38), joint.new_ones(()))
    return (joint * (ratio + eps).log()).sum()


def _by_task(value_MN: Tensor, routed: RouterOutput, tasks: int) -> Tensor:
    """Sums over the valid tokens of each task, (T, N)."""
    if routed.valid is not None:
        value_MN = value_MN.masked_fill(~routed.valid[:, None], 0.0)
    if routed.task is None:
        total = value_MN.sum(0, keepdim=True)
        return torch.cat((total, total.new_zeros(tasks - 1, total.shape[1])))
    # A product with one-hot rows instead of index_add: the same sum in every run on any device.
    onehot = torch.nn.functional.one_hot(routed.task, tasks).to(value_MN.dtype)
    return onehot.T @ value_MN


def _tokens(routed: RouterOutput, tasks: int) -> Tensor:
    return _by_task(torch.ones_like(routed.clean[:, :1]), routed, tasks)[:, 0]
