"""Softmax attention over given queries, keys and values, on the fastest exact path.

`torch.nn.functional.scaled_dot_product_attention` does the work, with one measured exception: its
CPU kernel is about five times slower than two matrix products in bfloat16 at short lengths, where
the (L, M) scores are small enough to hold.

Legend: S sequences, H query heads, K key heads, L queries, M keys, E head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Above this many keys the scores no longer fit the cache and the fused kernel wins again.
_SHORT = 512


def attend(
    q_SHLE: Tensor,
    k_SKME: Tensor,
    v_SKME: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    causal: bool,
) -> Tensor:
    """(S, H, L, E). `mask` is bool (True = visible), `bias` is added to the scores; both broadcast
    to (S, H, L, M). `causal` stands for the lower triangle and excludes `mask`."""
    if k_SKME.dtype != v_SKME.dtype or q_SHLE.dtype != v_SKME.dtype:
        q_SHLE, k_SKME = q_SHLE.to(v_SKME.dtype), k_SKME.to(v_SKME.dtype)
    if bias is not None:
        mask = _with_bias(mask, bias, causal)
        causal = False
    heads = (q_SHLE.shape[1], k_SKME.shape[1])
    low_precision = v_SKME.dtype == torch.bfloat16
    if v_SKME.device.type == "cpu" and low_precision and k_SKME.shape[2] <= _SHORT:
        return _explicit(q_SHLE, k_SKME, v_SKME, mask, causal)
    if mask is not None and mask.is_floating_point():
        mask = mask.to(q_SHLE.dtype)
    return F.scaled_dot_product_attention(
        q_SHLE, k_SKME, v_SKME, mask, is_causal=causal, enable_gqa=heads[0] != heads[1]
    )


def _with_bias(mask: Tensor | None, bias: Tensor, causal: bool) -> Tensor:
    if causal:
        length, keys = bias.shape[-2:]
        mask = torch.ones(length, keys, dtype=torch.bool, device=bias.device).tril()
    return bias if mask is None else bias.masked_fill(~mask, float("-inf"))


def _explicit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """softmax(q k' / sqrt(E) + mask) v as two batched products; softmax sums in float32."""
    rows, heads, length, width = q.shape
    keys = k.shape[2]
    if k.shape[1] != heads:
        groups = heads // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    q, k, v = q.reshape(-1, length, width), k.reshape(-1, keys, width), v.reshape(-1, keys, width)
    if causal:
        mask = torch.ones(1, 1, length, keys, dtype=torch.bool, device=q.device).tril()
    if mask is None:
        score = torch.bmm(q * width**-0.5, k.transpose(1, 2))
    else:
        if mask.dtype == torch.bool:
            # The most negative number, not infinity: a row that sees nothing stays finite.
            mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(
                ~mask, torch.finfo(q.dtype).min
            )
        mask = mask.to(q.dtype).expand(rows, heads, mask.shape[2], keys)
        mask = mask.reshape(-1, mask.shape[2], keys)
        score = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=width**-0.5)
    return torch.bmm(score.softmax(-1).to(v.dtype), v).view(rows, heads, length, width)
