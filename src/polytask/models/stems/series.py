"""Series to patch tokens, each series in its own units.

Every channel is standardised by its own mean and deviation over the observed values (RevIN, Kim et
al. 2022; patches as in PatchTST, arXiv 2211.14730), so a forecast head works at every scale; it
gets `loc` and `scale` to return to the units of the data. Missing values (NaN) are 0 with a flag.

Legend: n entries, L length, C channels, T tokens, P steps per patch.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from polytask.models.batch import Batch
from polytask.models.stems.entries import Entries

# A constant series has no deviation to divide by; this share of its level stands in.
_FLAT = 1e-5


def instance_norm(values_nLC: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Standardised values with 0 for NaN, observed flags, and loc and scale (n, 1, C)."""
    observed = ~values_nLC.isnan()
    filled = values_nLC.nan_to_num(0.0)
    count = observed.sum(1, keepdim=True).clamp(min=1)
    loc = filled.sum(1, keepdim=True) / count
    centred = (filled - loc) * observed
    scale = (centred.square().sum(1, keepdim=True) / count).sqrt()
    scale = torch.where(scale > _FLAT * loc.abs(), scale, loc.abs().clamp(min=_FLAT))
    return centred / scale, observed, loc, scale


class SeriesStem(nn.Module):
    """Patches of all channels through one linear layer; the last patch is always full.

    A series whose length is no multiple of the patch is padded with missing steps at its start, so
    the newest values, which a forecast depends on most, always stand at the same places.
    """

    def __init__(self, channels: int, patch: int, dim: int, level: bool) -> None:
        super().__init__()
        self.channels = channels
        self.patch = patch
        self.project = nn.Linear(2 * channels * patch, dim)
        self.level = nn.Linear(2 * channels, dim) if level else None

    def tokens(self, length: int) -> int:
        """Patch tokens of a series of `length` steps."""
        return max(1, -(-length // self.patch))

    def forward(self, batch: Batch) -> Entries:
        x_nLC, observed, loc, scale = instance_norm(batch.fields["series.values"].float())
        length = batch.known("series.length")
        count = np.maximum(1, -(-length // self.patch))
        width = int(count.max(initial=1)) * self.patch
        both = torch.stack((x_nLC, observed.to(x_nLC.dtype)), -1)  # (n, L, C, 2)
        both = self._align(both, length, count * self.patch, width)
        patches = both.reshape(both.shape[0], -1, self.patch * 2 * self.channels)
        tokens = self.project(patches.to(self.project.weight.dtype))
        if self.level is not None:
            tokens = torch.cat((self._level_token(loc, scale).to(tokens.dtype), tokens), 1)
            count = count + 1
        return Entries(
            tokens, batch.known("series.sequence"), count, loc=loc[:, 0], scale=scale[:, 0]
        )

    def _align(self, x: Tensor, length: np.ndarray, full: np.ndarray, width: int) -> Tensor:
        """(n, L, C, 2) to (n, width, channels, 2): each series ends where its last patch ends."""
        if x.shape[2] > self.channels:
            raise ValueError(f"a series has {x.shape[2]} channels, the stem takes {self.channels}")
        pad = (0, 0, 0, self.channels - x.shape[2], 0, max(0, width - x.shape[1]))
        x = nn.functional.pad(x, pad)
        shift = full - length  # missing steps at the start
        if not shift.any():
            return x[:, :width]
        source = (np.arange(width) - shift[:, None]) % x.shape[1]
        index = torch.from_numpy(source).to(x.device)
        return x.gather(1, index[:, :, None, None].expand(-1, -1, *x.shape[2:]))

    def _level_token(self, loc: Tensor, scale: Tensor) -> Tensor:
        """(n, 1, D): level and scale, squashed so that no unit of measurement dominates."""
        assert self.level is not None
        both = torch.stack((loc.asinh(), scale.log()), -1)  # (n, 1, C, 2)
        both = nn.functional.pad(both, (0, 0, 0, self.channels - both.shape[2]))
        token: Tensor = self.level(both.flatten(2).to(self.level.weight.dtype) * 0.25)
        return token
