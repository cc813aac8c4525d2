"""The one transformer: embeddings and a `MaskSpec` go in, hidden states come out.

Notable
- bidirectional, causal, prefix, packed and encoder-decoder attention share one weight layout: which
  of them runs is a matter of the mask and of `memory`, never of the weights;
- the mask, the rotary angles and the relative bias are made once per pass, not once per layer;
- a routing hook may replace a layer's feed-forward (skills, task gates) and gets task ids; with
  `experts` some blocks have a `SparseMoE` for a feed-forward, which gets them too;
- pre-norm, no biases in the norms' shift, output projections initialised smaller with depth
  (std / sqrt(2 layers), Radford et al. 2019), a key/value cache, gradient checkpointing.

Legend: S sequences, L length, M memory length, D width, H query heads, K key heads, E head width,
F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from polytask.configs import Config
from polytask.models.attention import attend
from polytask.models.cache import KVCache
from polytask.models.experts.config import ExpertsConfig
from polytask.models.experts.moe import RoutingRecord, SparseMoE
from polytask.models.experts.routers import TaskEmbedding
from polytask.models.masks import MaskSpec
from polytask.models.positions import RelativeBias, rotate, rotations


class TransformerConfig(Config):
    """Size and kind of a transformer."""

    dim: int = Field(128, gt=0, description="width of the residual stream")
    layers: int = Field(4, ge=0, description="number of blocks")
    heads: int = Field(4, gt=0, description="query heads; each has dim / heads features")
    kv_heads: int | None = Field(None, gt=0, description="key heads, shared by groups of queries")
    ffn_mult: float = Field(4.0, gt=0, description="feed-forward width / dim (2/3 of it if gated)")
    gated: bool = Field(False, description="SiLU-gated feed-forward instead of plain GELU")
    norm: Literal["rms", "layer"] = Field("layer", description="layer is ~5x faster on CPUs")
    positions: Literal["rope", "learned", "relative", "none"] = "rope"
    max_length: int = Field(1024, gt=0, description="longest sequence (learned positions only)")
    rope_base: float = Field(10_000.0, gt=1)
    relative_tables: Literal["shared", "layer"] = Field(
        "shared", description="one table of relative biases for all layers, or one for each"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="on each block's two branches")
    experts: ExpertsConfig | None = Field(
        None, description="sparse experts instead of some blocks' feed-forward"
    )

    @model_validator(mode="after")
    def _shapes_fit(self) -> TransformerConfig:
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not divisible by heads {self.heads}")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"heads {self.heads} is not divisible by kv_heads {self.kv_heads}")
        if self.positions == "rope" and (self.dim // self.heads) % 2:
            raise ValueError(f"rope needs an even head width, not {self.dim // self.heads}")
        if self.experts is not None:
            self.experts.layers(self.layers)
        return self

    @property
    def ffn_dim(self) -> int:
        """Feed-forward width: a gated one has three matrices, so two thirds cost the same."""
        width = self.ffn_mult * self.dim * (2 / 3 if self.gated else 1)
        return max(8, round(width / 8) * 8)


@dataclass(frozen=True)
class RouteContext:
    """What a router may condition on."""

    task: Tensor | None  # (S,) task id of each sequence
    valid: Tensor | None  # (S, L) bool, False at padding; None: all tokens are valid
    rows: Tensor | None = None  # (S,) row index of each sequence
    vectors: Tensor | None = None  # (tasks, E) task embeddings, which the trunk fills in
    record: RoutingRecord | None = None  # gets what the routers say


class Route(Protocol):
    """Stands in for a layer's feed-forward; may call it. Returns (S, L, D)."""

    def __call__(
        self, layer: int, feed_forward: nn.Module, x_SLD: Tensor, context: RouteContext
    ) -> Tensor: ...


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang and Sennrich 2019); statistics in float32."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class LayerNorm(nn.Module):
    """Layer normalisation without a shift."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), None, self.eps)


def make_norm(kind: str, dim: int) -> nn.Module:
    return RMSNorm(dim) if kind == "rms" else LayerNorm(dim)


class FeedForward(nn.Module):
    """Two layers with GELU, or SiLU-gated (Shazeer 2020) when `gated`."""

    def __init__(self, dim: int, hidden: int, gated: bool) -> None:
        super().__init__()
        self.gated = gated
        self.up = nn.Linear(dim, hidden * (2 if gated else 1), bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        if self.gated:
            gate, h = h.chunk(2, -1)
            h = F.silu(gate) * h
        else:
            h = F.gelu(h)  # the exact form is also the faster one on CPUs
        out: Tensor = self.down(h)
        return out


@dataclass
class _Pass:
    """What all layers of one forward pass share."""

    mask: Tensor | None
    causal: bool
    bias: Tensor | None  # relative bias, (S or 1, H or H * layers, L, M)
    rotation: Tensor | None
    memory: Tensor | None
    memory_mask: Tensor | None
    cache: KVCache | None
    route: Route | None
    context: RouteContext


class SelfAttention(nn.Module):
    """Queries, keys and values of the same tokens, in one projection."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.kv_heads = config.kv_heads or config.heads
        self.width = config.dim // config.heads
        self.qkv = nn.Linear(config.dim, (self.heads + 2 * self.kv_heads) * self.width, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x_SLD: Tensor, layer: int, shared: _Pass) -> Tensor:
        h = self.qkv(x_SLD).unflatten(-1, (-1, self.width))  # (S, L, H + 2K, E)
        qk, v = h.split((self.heads + self.kv_heads, self.kv_heads), dim=2)
        if shared.rotation is not None:
            qk = rotate(qk, shared.rotation)
        q, k = qk.split((self.heads, self.kv_heads), dim=2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (S, heads, L, E)
        if shared.cache is not None:
            k, v = shared.cache.write(layer, k, v)
        bias = shared.bias
        if bias is not None and bias.shape[1] > self.heads:  # a table per layer, side by side
            bias = bias.narrow(1, layer * self.heads, self.heads)
        mixed = attend(q, k, v, shared.mask, bias, shared.causal)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class CrossAttention(nn.Module):
    """Queries from the tokens, keys and values from a memory."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.kv_heads = config.kv_heads or config.heads
        self.width = config.dim // config.heads
        self.q = nn.Linear(config.dim, config.dim, bias=False)
        self.kv = nn.Linear(config.dim, 2 * self.kv_heads * self.width, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def keys_values(self, memory_SMD: Tensor) -> tuple[Tensor, Tensor]:
        h = self.kv(memory_SMD).unflatten(-1, (-1, self.width)).transpose(1, 2)
        k, v = h.split(self.kv_heads, dim=1)
        return k, v

    def forward(self, x_SLD: Tensor, layer: int, shared: _Pass) -> Tensor:
        assert shared.memory is not None
        q = self.q(x_SLD).unflatten(-1, (-1, self.width)).transpose(1, 2)  # (S, H, L, E)
        cache = shared.cache
        if cache is None:
            k, v = self.keys_values(shared.memory)
        else:
            if layer == len(cache.memory):
                cache.memory.append(self.keys_values(shared.memory))
            k, v = cache.memory[layer]
        mixed = attend(q, k, v, shared.memory_mask, None, False)
        if shared.memory_mask is not None:
            # A token that sees no memory gets nothing from it (softmax over nothing is undefined).
            nothing = ~shared.memory_mask.any(-1, keepdim=True)  # (S, 1, L or 1, 1)
            mixed = mixed.masked_fill(nothing, 0.0)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """x + attention(norm x), then + cross-attention (decoders), then + feed-forward(norm x)."""

    def __init__(
        self, config: TransformerConfig, cross: bool, moe: SparseMoE | None = None
    ) -> None:
        super().__init__()
        self.norm1 = make_norm(config.norm, config.dim)
        self.attention = SelfAttention(config)
        self.norm_cross = make_norm(config.norm, config.dim) if cross else None
        self.cross = CrossAttention(config) if cross else None
        self.norm2 = make_norm(config.norm, config.dim)
        self.feed_forward = moe or FeedForward(config.dim, config.ffn_dim, config.gated)
        self.dropout = config.dropout

    def forward(self, x_SLD: Tensor, layer: int, shared: _Pass) -> Tensor:
        x = x_SLD + self._drop(self.attention(self.norm1(x_SLD), layer, shared))
        if self.cross is not None and self.norm_cross is not None and shared.memory is not None:
            x = x + self._drop(self.cross(self.norm_cross(x), layer, shared))
        h = self.norm2(x)
        if shared.route is not None:
            h = shared.route(layer, self.feed_forward, h, shared.context)
        elif isinstance(self.feed_forward, SparseMoE):
            c = shared.context
            h = self.feed_forward(h, c.task, c.vectors, c.valid, c.record, layer)
        else:
            h = self.feed_forward(h)
        return x + self._drop(h)

    def _drop(self, h: Tensor) -> Tensor:
        if self.training and self.dropout > 0:
            return F.dropout(h, self.dropout)
        return h


class Transformer(nn.Module):
    """Blocks and a final norm. With `cross`, blocks also attend to a memory (a decoder).

    With `config.experts`, blocks `sparse` have experts; `tasks` are the names that gates go by.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        cross: bool = False,
        bidirectional: bool = True,
        tasks: Sequence[str] = (),
    ) -> None:
        """`bidirectional` only matters to relative positions: buckets for both directions."""
        super().__init__()
        self.config = config
        self.dim = config.dim
        experts = config.experts
        self.sparse = () if experts is None else experts.layers(config.layers)
        self.blocks = nn.ModuleList(
            Block(config, cross, self._moe(layer, tasks)) for layer in range(config.layers)
        )
        self.task_embedding: TaskEmbedding | None = None
        if experts is not None and experts.router == "conditioned":
            self.task_embedding = TaskEmbedding(len(tasks), experts.task_dim)
        self.norm = make_norm(config.norm, config.dim)
        self.learned: nn.Embedding | None = None
        self.relative: RelativeBias | None = None
        if config.positions == "learned":
            self.learned = nn.Embedding(config.max_length, config.dim)
        elif config.positions == "relative":
            tables = config.layers if config.relative_tables == "layer" else 1
            self.relative = RelativeBias(config.heads * tables, 32, 128, bidirectional)
        self.gradient_checkpointing = False

    def _moe(self, layer: int, tasks: Sequence[str]) -> SparseMoE | None:
        experts = self.config.experts
        if experts is None or layer not in self.sparse:
            return None
        return SparseMoE(self.dim, experts, tasks, self.sparse.index(layer))

    def forward(
        self,
        x_SLD: Tensor,
        mask: MaskSpec | None = None,
        *,
        memory: Tensor | None = None,
        route: Route | None = None,
        context: RouteContext | None = None,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> Tensor:
        """(S, L, D) hidden states after the final norm.

        memory     (S, M, D) to cross-attend to; mask.memory_length says how much of it is valid
        route      stands in for the feed-forwards; gets `context`
        cache      keys and values of earlier tokens; `x` then holds the new tokens only, and
                   mask.length counts the valid ones among them
        positions  (S, L) int, if not 0, 1, 2, ... (packed sequences restart in each segment)
        start, stop  run only blocks start..stop-1 (to train upper layers over stored lower
                   activations); the final norm belongs to the last block
        """
        mask = mask or MaskSpec()
        shared, positions = self._shared(x_SLD, mask, memory, cache, positions)
        shared.route = route
        shared.context = context or RouteContext(
            None, mask.valid(x_SLD.shape[1], x_SLD.device) if route or self.sparse else None
        )
        if self.task_embedding is not None:
            shared.context = replace(shared.context, vectors=self.task_embedding())
        x = x_SLD
        if self.learned is not None and start == 0:
            x = x + self._learned(positions)
        stop = len(self.blocks) if stop is None else stop
        for layer in range(start, stop):
            block: Callable[..., Tensor] = self.blocks[layer]
            if self.gradient_checkpointing and torch.is_grad_enabled() and cache is None:
                x = checkpoint(block, x, layer, shared, use_reentrant=False)
            else:
                x = block(x, layer, shared)
        if cache is not None:
            cache.finish(x_SLD.shape[1], mask.length)
        return self.norm(x) if stop == len(self.blocks) else x

    def _learned(self, positions: Tensor) -> Tensor:
        assert self.learned is not None
        if positions.shape[-1] > self.config.max_length:
            raise ValueError(
                f"a sequence of {positions.shape[-1]} tokens is longer than max_length "
                f"{self.config.max_length} of the learned positions"
            )
        embedded: Tensor = self.learned(positions)
        return embedded

    def _shared(
        self,
        x_SLD: Tensor,
        mask: MaskSpec,
        memory: Tensor | None,
        cache: KVCache | None,
        positions: Tensor | None,
    ) -> tuple[_Pass, Tensor]:
        rows, length, device = x_SLD.shape[0], x_SLD.shape[1], x_SLD.device
        keys: Tensor
        if cache is None:
            if positions is None:
                positions = torch.arange(length, device=device)[None]
            keys = positions
            visible, causal = mask.attention(length, device)
        else:
            if not mask.causal or mask.segments is not None or positions is not None:
                raise ValueError("a cache needs causal attention without segments")
            positions = cache.begin(rows, length, mask.length, device)
            slots = cache.width + length
            keys = torch.arange(slots, device=device)[None]
            alone = not cache.ragged and mask.prefix is None
            causal = alone and cache.width == 0
            see_all = alone and length == 1
            visible = None if causal or see_all else mask.cached_attention(positions, slots)
        rotation = None
        if self.config.positions == "rope":
            width = self.config.dim // self.config.heads
            rotation = rotations(positions, width, self.config.rope_base)
        bias = None if self.relative is None else self.relative(positions, keys)
        memory_mask = None
        if memory is not None:
            memory_mask = mask.cross_attention(memory.shape[1], device)
        context = RouteContext(None, None)
        return (
            _Pass(visible, causal, bias, rotation, memory, memory_mask, cache, None, context),
            positions,
        )
