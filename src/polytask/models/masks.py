"""Who may look at whom: `MaskSpec` says it in a few small tensors and builds a mask if needed.

One record covers bidirectional, causal, prefix, packed (segments) and encoder-decoder attention, so
a transformer has one weight layout for all of them. A mask tensor is made once per forward pass and
shared by all layers; when nothing is masked, or plain causality is all, there is none.

Legend: S sequences, L length, M memory length, N new tokens, C cache slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MaskSpec:
    """What a token may attend to. All tensors are optional; None means 'no such restriction'.

    causal    False: every token sees every valid token. True: itself and earlier ones.
    length    (S,) int: tokens from this index on are padding (right padding only).
    prefix    with `causal`: (S,) int, tokens before this index are seen by all tokens of the
              sequence; or (S, L) bool, the tokens so marked are seen by all of their segment.
    segments  (S, L) int: tokens of different segments never see each other (packing).
    memory_length    (S,) int: valid tokens of the memory; 0 gives no contribution at all.
    memory_segments  (S, M) int: a token sees only the memory of its own segment.
    """

    causal: bool = False
    length: Tensor | None = None
    prefix: Tensor | None = None
    segments: Tensor | None = None
    memory_length: Tensor | None = None
    memory_segments: Tensor | None = None

    def __post_init__(self) -> None:
        if self.prefix is not None and not self.causal:
            raise ValueError("a prefix only restricts causal attention: set causal=True")
        if (self.memory_segments is not None) and self.segments is None:
            raise ValueError("memory_segments needs segments for the tokens as well")

    def valid(self, length: int, device: torch.device) -> Tensor | None:
        """(S, L) bool, False at padding; None when there is none."""
        if self.length is None:
            return None
        return torch.arange(length, device=device) < self.length[:, None]

    def attention(self, length: int, device: torch.device) -> tuple[Tensor | None, bool]:
        """The self-attention mask, broadcastable to (S, 1, L, L), True = visible, and whether
        plain causality (no tensor) is enough.

        Right padding needs no mask under plain causality: padding comes after all valid tokens.
        """
        if self.segments is None and self.prefix is None:
            if self.causal:
                return None, True
            if self.length is None:
                return None, False
            # A sequence without any token still sees its first slot: no softmax over nothing.
            key = torch.arange(length, device=device) < self.length.clamp(min=1)[:, None]
            return key[:, None, None, :], False
        index = torch.arange(length, device=device)
        visible: Tensor | None = None
        if self.causal:
            visible = (index[None, :] <= index[:, None])[None]  # (1, L, L)
            if self.prefix is not None:
                early = self.prefix
                if early.dtype != torch.bool:
                    early = index < early[:, None]
                visible = visible | early[:, None, :]
        if self.segments is not None:
            same = self.segments[:, :, None] == self.segments[:, None, :]
            visible = same if visible is None else visible & same
        assert visible is not None
        if self.length is not None and not self.causal:
            # Padding still sees itself, so that its softmax is finite; nobody else sees it.
            valid = index < self.length[:, None]
            visible = (visible & valid[:, None, :]) | torch.eye(
                length, dtype=torch.bool, device=device
            )
        return visible[:, None], False  # (S, 1, L, L)

    def cross_attention(self, memory_length: int, device: torch.device) -> Tensor | None:
        """The mask over memory, broadcastable to (S, 1, L, M); None when all of it is visible."""
        visible: Tensor | None = None
        if self.memory_length is not None:
            visible = torch.arange(memory_length, device=device) < self.memory_length[:, None]
            visible = visible[:, None, :]
        if self.memory_segments is not None:
            assert self.segments is not None
            same = self.segments[:, :, None] == self.memory_segments[:, None, :]
            visible = same if visible is None else visible & same
        return None if visible is None else visible[:, None]

    def cached_attention(self, position: Tensor, slots: int) -> Tensor:
        """(S, 1, N, C): which cache slots new tokens at absolute `position` (S, N) may see."""
        slot = torch.arange(slots, device=position.device)
        visible = slot <= position[:, :, None]
        if self.prefix is not None:
            if self.prefix.dtype == torch.bool:
                raise ValueError("a cache needs the prefix as a length, not as a mask")
            visible = visible | (slot < self.prefix[:, None])[:, None, :]
        return visible[:, None]
