"""Blocks in which current spikes look at the past, at video, at behaviour, and at themselves.

Queries are always the current tokens, so the cost is |current| x (sum of the modalities' tokens):
linear in their number. A modality that is absent from a batch is skipped.

The blocks are not those of `models.transformer`: keys and values come from the memory as it is (it
is not normalised, and for self-attention it is the raw residual stream), projections have biases,
and every block ends in a norm of its own. Attention itself and the cache are shared.

Legend: B windows, L current tokens, M memory tokens, E width, H heads, W head width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polytask.models.attention import attend
from polytask.models.cache import KVCache


@dataclass(frozen=True)
class Memory:
    """Tokens (B, M, E) to look at, and which of them are there: (B, M) bool, None: all."""

    tokens: Tensor
    valid: Tensor | None = None


@dataclass
class Trace:
    """Attention weights by stage, one (B, H, L, M) a layer, still part of the graph."""

    weights: dict[str, list[Tensor]] = field(default_factory=dict)


class Attention(nn.Module):
    """Multi-head attention with separate projections; weights on request."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def _split(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        return x.view(rows, length, self.heads, width // self.heads).transpose(1, 2)

    def keys_values(self, memory_BME: Tensor) -> tuple[Tensor, Tensor]:
        """Each (B, H, M, W)."""
        return self._split(self.key(memory_BME)), self._split(self.value(memory_BME))

    def forward(
        self,
        x_BLE: Tensor,
        keys: Tensor,
        values: Tensor,
        visible: Tensor | None,
        causal: bool,
        weights: list[Tensor] | None = None,
    ) -> Tensor:
        """`visible`: (B, M) bool. A window that sees nothing gets nothing."""
        query = self._split(self.query(x_BLE))
        mask = nothing = None
        if visible is not None:
            nothing = ~visible.any(-1)[:, None, None, None]
            mask = visible[:, None, None, :] | nothing
        drop = self.dropout if self.training else 0.0
        if weights is None and drop == 0.0:
            mixed = attend(query, keys, values, mask, None, causal)
        else:
            score = (query @ keys.transpose(-1, -2)).float() / math.sqrt(query.shape[-1])
            if causal:
                lower = torch.ones(score.shape[-2:], dtype=torch.bool, device=score.device).tril()
                mask = lower if mask is None else mask & lower
            if mask is not None:
                score = score.masked_fill(~mask, float("-inf"))
            share = score.softmax(-1)
            if weights is not None:
                weights.append(share)
            mixed = F.dropout(share, drop, self.training).to(values.dtype) @ values
        if nothing is not None:
            mixed = mixed.masked_fill(nothing, 0.0)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return F.dropout(out, drop, self.training)


class NeuroBlock(nn.Module):
    """x = q + Attention(LN q, kv); x = x + MLP(LN x); LN x, with kv as it comes."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.dropout = dropout

    def forward(
        self,
        q_BLE: Tensor,
        keys: Tensor,
        values: Tensor,
        visible: Tensor | None = None,
        causal: bool = False,
        weights: list[Tensor] | None = None,
    ) -> Tensor:
        x = q_BLE + self.attention(self.norm1(q_BLE), keys, values, visible, causal, weights)
        h = self.down(F.gelu(self.up(self.norm2(x))))
        out: Tensor = self.norm(x + F.dropout(h, self.dropout, self.training))
        return out


def blocks(count: int, dim: int, heads: int, dropout: float) -> nn.ModuleList:
    return nn.ModuleList(NeuroBlock(dim, heads, dropout) for _ in range(count))


def self_attend(
    layers: nn.ModuleList,
    x_BLE: Tensor,
    causal: bool,
    cache: KVCache | None = None,
    first: int = 0,
    weights: list[Tensor] | None = None,
) -> Tensor:
    """Blocks whose keys and values are their own input. With a cache (`begin` was called by whoever
    owns it) `x` holds new tokens only; their keys are number `first` and on in the cache."""
    x = x_BLE
    for number, block in enumerate(layers):
        assert isinstance(block, NeuroBlock)
        keys, values = block.attention.keys_values(x)
        if cache is not None:
            keys, values = cache.write(first + number, keys, values)
        x = block(x, keys, values, None, causal and keys.shape[2] == x.shape[1], weights)
    return x


def cross_attend(
    layers: nn.ModuleList,
    x_BLE: Tensor,
    memory: Memory,
    cache: KVCache | None = None,
    first: int = 0,
    weights: list[Tensor] | None = None,
) -> Tensor:
    """Blocks that look at a memory, whose keys and values a cache keeps from the first call on."""
    x = x_BLE
    for number, block in enumerate(layers):
        assert isinstance(block, NeuroBlock)
        if cache is None:
            keys, values = block.attention.keys_values(memory.tokens)
        else:
            if first + number == len(cache.memory):
                cache.memory.append(block.attention.keys_values(memory.tokens))
            keys, values = cache.memory[first + number]
        x = block(x, keys, values, memory.valid, False, weights)
    return x


class CrossModalStack(nn.Module):
    """Modalities one after the other in the given order, then causal self-attention.

    Args:
        order: (name, number of blocks) of each modality.
        layers: causal blocks on the current tokens at the end.
    """

    def __init__(
        self,
        order: Sequence[tuple[str, int]],
        layers: int,
        dim: int,
        heads: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.order = tuple(name for name, _ in order)
        self.cross = nn.ModuleDict({n: blocks(count, dim, heads, dropout) for n, count in order})
        self.state = blocks(layers, dim, heads, dropout)

    def forward(
        self,
        x_BLE: Tensor,
        memories: Mapping[str, Memory],
        trace: Trace | None = None,
        cache: KVCache | None = None,
        first: int = 0,
    ) -> Tensor:
        """(B, L, E). `trace` gets the attention weights; `first`: self-attention layers that were
        written to the cache before this stack."""
        x, used = x_BLE, 0
        for name in self.order:
            layers = self.cross[name]
            assert isinstance(layers, nn.ModuleList)
            if name not in memories:
                continue
            kept = _kept(trace, name)
            x = cross_attend(layers, x, memories[name], cache, used, kept)
            used += len(layers)
        return self_attend(self.state, x, True, cache, first, _kept(trace, "state"))


def _kept(trace: Trace | None, stage: str) -> list[Tensor] | None:
    return None if trace is None else trace.weights.setdefault(stage, [])
