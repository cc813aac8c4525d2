"""From spikes, frames and scalars to tokens of one width.

Legend: B windows, L tokens, E width, T frames, S samples, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polytask.models.neuro.config import VideoConfig


class TimeSinusoid(nn.Module):
    """sin and cos of a number at frequencies 10000^(-2k/E), interleaved; nothing is learned."""

    frequency: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("frequency", frequencies(dim), persistent=False)

    def forward(self, value: Tensor) -> Tensor:
        """(...) numbers -> (..., E)."""
        angle = value.unsqueeze(-1).to(self.frequency.dtype) * self.frequency
        return torch.stack((angle.sin(), angle.cos()), -1).flatten(-2)


def frequencies(dim: int) -> Tensor:
    """(E / 2,) from 1 down to almost 1 / 10000."""
    return 10_000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)


class LearnedTime(nn.Module):
    """Linear(1, E/2), GELU, Linear(E/2, E) of the time index: what shipped configurations use."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(1, dim // 2)
        self.down = nn.Linear(dim // 2, dim)

    def forward(self, value: Tensor) -> Tensor:
        """(...) numbers -> (..., E)."""
        out: Tensor = self.down(F.gelu(self.up(value.unsqueeze(-1).to(self.up.weight.dtype))))
        return out


def make_time(kind: str, dim: int) -> nn.Module:
    return LearnedTime(dim) if kind == "learned" else TimeSinusoid(dim)


class ScalarEncoder(nn.Module):
    """Samples of one variable as tokens: Linear(1, 2), GELU, Linear(2, E) plus their time.

    `norm` puts the published code's layer norm over the single feature in front: it is 0 whatever
    the value, so only the time of the sample is left.
    """

    def __init__(self, dim: int, dropout: float, norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(1) if norm else None
        self.up = nn.Linear(1, 2, bias=False)
        self.down = nn.Linear(2, dim, bias=False)
        self.time = TimeSinusoid(dim)
        self.dropout = dropout

    def forward(self, value_BS: Tensor, offset_BS: Tensor) -> Tensor:
        """(B, S) values and their offsets in seconds -> (B, S, E)."""
        x = value_BS.unsqueeze(-1).to(self.up.weight.dtype)
        if self.norm is not None:
            x = self.norm(x)
        x = self.down(F.gelu(self.up(x))) + self.time(offset_BS)
        return F.dropout(x, self.dropout, self.training)


def axis_code(length: int, channels: int, interleaved: bool, device: torch.device) -> Tensor:
    """(length, channels) sinusoids of 0, 1, ...; channels is even."""
    position = torch.arange(length, dtype=torch.float32, device=device)
    angle = position[:, None] * frequencies(channels).to(device)
    parts = (angle.sin(), angle.cos())
    return torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)


def grid_code(grid: tuple[int, int, int], dim: int, device: torch.device) -> Tensor:
    """(T, H, W, E): a third of the channels each for time, height and width."""
    channels = -(-dim // 6) * 2
    t, h, w = grid
    found = torch.zeros(t, h, w, 3 * channels, device=device)
    found[..., :channels] = axis_code(t, channels, False, device)[:, None, None]
    found[..., channels : 2 * channels] = axis_code(h, channels, False, device)[None, :, None]
    found[..., 2 * channels :] = axis_code(w, channels, False, device)[None, None]
    return found[..., :dim]


def row_code(length: int, dim: int, device: torch.device) -> Tensor:
    """(L, E) of a grid with one column: half of the channels for the row, half for column 0."""
    channels = -(-dim // 4) * 2
    column = axis_code(1, channels, True, device).expand(length, -1)
    return torch.cat([axis_code(length, channels, True, device), column], -1)[:, :dim]


class VideoPatches(nn.Module):
    """Frames as patches of space and time: Conv3d, layer norm, ReLU, 3-D positions."""

    def __init__(self, config: VideoConfig, dim: int, positions: bool) -> None:
        super().__init__()
        self.config, self.dim, self.positions = config, dim, positions
        self.conv = nn.Conv3d(1, dim, config.kernel, config.stride or config.kernel)
        self.norm = nn.LayerNorm(dim)

    def forward(self, frames_BTHW: Tensor) -> Tensor:
        """(B, T, H, W) -> (B, patches, E), time slowest."""
        x = self.conv(frames_BTHW.unsqueeze(1).to(self.conv.weight.dtype))
        x = F.relu(self.norm(x.movedim(1, -1)))  # (B, T', H', W', E)
        if self.positions:
            x = x + grid_code(self.config.grid, self.dim, x.device)
        return x.flatten(1, 3)


class SpikeStem(nn.Module):
    """Token + time + learned place (zero at first). Current and past share the token table only."""

    def __init__(self, block: int, dim: int, kind: str, dropout: float) -> None:
        super().__init__()
        self.time = make_time(kind, dim)
        self.place = nn.Parameter(torch.zeros(1, block, dim))
        self.dropout = dropout

    def forward(self, table: nn.Embedding, ids: Tensor, times: Tensor, start: int = 0) -> Tensor:
        """(B, L) ids and time indices, the first of them token number `start` -> (B, L, E)."""
        place = self.place[:, start : start + ids.shape[1]]
        return F.dropout(table(ids) + self.time(times) + place, self.dropout, self.training)
