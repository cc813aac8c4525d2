"""Where a token stands: rotary angles, learned embeddings, or T5's relative bias.

RoPE (Su et al. 2021, arXiv 2104.09864) rotates pairs of features of queries and keys by an angle
proportional to the position, so that their product depends on the distance alone. T5's bias
(Raffel et al. 2020, arXiv 1910.10683) adds a learned number per head and distance bucket.

Legend: S sequences, L length, H heads, E head width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def rotations(position: Tensor, width: int, base: float) -> Tensor:
    """Unit complex numbers (..., width / 2) for `position` (...,): angle = position / base^(2i/E).

    Made anew in each forward pass (a few microseconds) rather than kept in a buffer: a buffer of
    complex numbers would lose its imaginary part in `module.to(torch.bfloat16)`.
    """
    frequency = base ** (torch.arange(0, width, 2, device=position.device) * (-1.0 / width))
    angle = position[..., None] * frequency
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x_SLHE: Tensor, rotation_SLE: Tensor) -> Tensor:
    """Rotate neighbouring feature pairs; computed in float32 at least, returned as it came."""
    wide = x_SLHE.to(torch.promote_types(x_SLHE.dtype, torch.float32))
    pairs = torch.view_as_complex(wide.view(*x_SLHE.shape[:-1], -1, 2))
    turned = torch.view_as_real(pairs * rotation_SLE.unsqueeze(-2)).flatten(-2)
    return turned.to(x_SLHE.dtype)


class RelativeBias(nn.Module):
    """T5's bias: near distances have a bucket each, far ones share logarithmically wide buckets."""

    def __init__(self, heads: int, buckets: int, furthest: int, bidirectional: bool) -> None:
        super().__init__()
        self.buckets = buckets
        self.furthest = furthest
        self.bidirectional = bidirectional
        self.bias = nn.Embedding(buckets, heads)

    def bucket(self, distance: Tensor) -> Tensor:
        """Bucket of `distance` = key position - query position, any shape."""
        buckets = self.buckets
        offset = torch.zeros_like(distance)
        if self.bidirectional:
            buckets //= 2
            offset = (distance > 0).long() * buckets
            distance = distance.abs()
        else:
            distance = (-distance).clamp(min=0)
        exact = buckets // 2
        ratio = (distance.clamp(min=1).float() / exact).log() / math.log(self.furthest / exact)
        far = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
        return offset + torch.where(distance < exact, distance, far)

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        """(S or 1, H, L, M) bias for positions `query` (S or 1, L) and `key` (S or 1, M)."""
        distance = key[:, None, :] - query[:, :, None]
        bias: Tensor = self.bias(self.bucket(distance))
        return bias.permute(0, 3, 1, 2)
