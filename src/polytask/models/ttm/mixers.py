"""The mixers of a Tiny Time Mixer: gate, MLP, one axis at a time, adaptive patching.

Shape suffixes: B batch, T time, C channels, N patches, D features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polytask.models.ttm.config import Mode, TTMConfig


class InstanceNorm(nn.Module):
    """loc and scale of each window and channel over its observed steps (population variance).

    A channel with nothing observed gets loc 0 and scale sqrt(eps); a constant one scale sqrt(eps).
    """

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x_BTC: Tensor, observed_BTC: Tensor) -> tuple[Tensor, Tensor]:
        """Returns loc and scale, (B, 1, C) each, in float32."""
        x, mask = x_BTC.float(), observed_BTC.float()
        count = mask.sum(1, keepdim=True).clamp(min=1)
        loc = (x * mask).sum(1, keepdim=True) / count
        variance = (((x - loc) * mask) ** 2).sum(1, keepdim=True) / count
        return loc, torch.sqrt(variance + self.eps)


def _linear(layer: nn.Linear, x: Tensor, leading: bool) -> Tensor:
    """`layer` over the last axis of x, or over the first axis of a matrix (size, columns)."""
    if not leading:
        return F.linear(x, layer.weight, layer.bias)
    return torch.addmm(layer.bias[:, None], layer.weight, x)


class Gate(nn.Module):
    """x * softmax(W x + b) over the last axis; `leading`: over the first axis of a matrix."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.attn_layer = nn.Linear(size, size)

    def forward(self, x: Tensor, leading: bool = False) -> Tensor:
        return x * torch.softmax(_linear(self.attn_layer, x, leading), dim=0 if leading else -1)


class NoGate(nn.Module):
    """x as it is."""

    def forward(self, x: Tensor, leading: bool = False) -> Tensor:
        return x


class MixerMLP(nn.Module):
    """Linear, GELU, Linear with dropout after each; the axis as in `Gate`."""

    def __init__(self, size: int, expansion: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(size, size * expansion)
        self.fc2 = nn.Linear(size * expansion, size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, leading: bool = False) -> Tensor:
        hidden = self.dropout(F.gelu(_linear(self.fc1, x, leading)))
        out: Tensor = self.dropout(_linear(self.fc2, hidden, leading))
        return out


class Norm(nn.Module):
    """LayerNorm over features, one level down so that published names fit."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x)
        return out


class AxisMixer(nn.Module):
    """x + gate(mlp(norm(x))) over one axis of (B, C, N, D): 3 features, 2 patches, 1 channels.

    Over channels the gate comes before the MLP, as published. Patches and channels are mixed with
    their axis in front, as one matrix product over all columns: a short last axis is slow.
    """

    def __init__(self, config: TTMConfig, width: int, size: int, axis: int, dropout: float) -> None:
        super().__init__()
        self.axis = axis
        self.norm = Norm(width, config.norm_eps)
        self.mlp = MixerMLP(size, config.expansion_factor, dropout)
        self.gating_block = Gate(size) if config.gated_attn else NoGate()

    def forward(self, x_BCND: Tensor) -> Tensor:
        y = self.norm(x_BCND)
        if self.axis == 3:
            return x_BCND + self._mix(y, leading=False)
        front = y.movedim(self.axis, 0)
        mixed = self._mix(front.reshape(front.shape[0], -1), leading=True)
        return x_BCND + mixed.view(front.shape).movedim(0, self.axis)

    def _mix(self, y: Tensor, leading: bool) -> Tensor:
        first, second = (
            (self.gating_block, self.mlp) if self.axis == 1 else (self.mlp, self.gating_block)
        )
        out: Tensor = second(first(y, leading), leading)
        return out


class MixerLayer(nn.Module):
    """Channels (only in mode mix_channel), then patches (when there are several), then features."""

    def __init__(
        self, config: TTMConfig, width: int, patches: int, mode: Mode, dropout: float
    ) -> None:
        super().__init__()
        channels = config.num_input_channels
        self.channel_feature_mixer = (
            AxisMixer(config, width, channels, 1, dropout) if mode == "mix_channel" else None
        )
        self.patch_mixer = AxisMixer(config, width, patches, 2, dropout) if patches > 1 else None
        self.feature_mixer = AxisMixer(config, width, width, 3, dropout)

    def forward(self, x_BCND: Tensor) -> Tensor:
        if self.channel_feature_mixer is not None:
            x_BCND = self.channel_feature_mixer(x_BCND)
        if self.patch_mixer is not None:
            x_BCND = self.patch_mixer(x_BCND)
        out: Tensor = self.feature_mixer(x_BCND)
        return out


class AdaptiveLevel(nn.Module):
    """`layers` mixer layers at patch factor K = 2^level; K = 1 where features would get too few."""

    def __init__(
        self, config: TTMConfig, width: int, level: int, layers: int, mode: Mode, dropout: float
    ) -> None:
        super().__init__()
        self.factor = 2**level if width // 2**level > 4 else 1
        inner, patches = width // self.factor, config.patches * self.factor
        self.mixer_layers = nn.ModuleList(
            MixerLayer(config, inner, patches, mode, dropout) for _ in range(layers)
        )

    def forward(self, x_BCND: Tensor) -> Tensor:
        B, C, N, D = x_BCND.shape
        x = x_BCND.reshape(B, C, N * self.factor, D // self.factor)
        for layer in self.mixer_layers:
            x = layer(x)
        out: Tensor = x.reshape(B, C, N, D)
        return out


class MixerBlock(nn.Module):
    """Levels from the finest patches to the coarsest, or plain layers when there are no levels."""

    def __init__(
        self, config: TTMConfig, width: int, levels: int, layers: int, mode: Mode, dropout: float
    ) -> None:
        super().__init__()
        self.mixers = nn.ModuleList(
            [
                AdaptiveLevel(config, width, level, layers, mode, dropout)
                for level in reversed(range(levels))
            ]
            or [MixerLayer(config, width, config.patches, mode, dropout) for _ in range(layers)]
        )

    def forward(self, x_BCND: Tensor) -> Tensor:
        for mixer in self.mixers:
            x_BCND = mixer(x_BCND)
        return x_BCND
