"""Windows as tensors on a device: what the model sees of `polytask.data.spike_windows.SpikeBatch`.

Legend: B windows, K tokens that enter the model, P tokens of the past, T frames, S samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class NeuroBatch:
    """Tokens, times and modalities of B windows; targets are the same tokens one later."""

    ids: Tensor  # (B, K + 1) int64
    times: Tensor  # (B, K + 1) int64
    past_ids: Tensor  # (B, P) int64
    past_times: Tensor  # (B, P) int64
    frames: Tensor | None = None  # (B, T, H, W) float32
    behavior: Mapping[str, Tensor] = field(default_factory=dict)  # name -> (B, S) float32
    offset: Mapping[str, Tensor] = field(default_factory=dict)  # name -> (B, S) seconds
    targets: Mapping[str, Tensor] = field(default_factory=dict)  # name -> (B,) float32 or int64
    row: Tensor | None = None  # (B,) int64: names windows in errors

    @classmethod
    def of(cls, windows: Any) -> NeuroBatch:
        """From a `SpikeBatch` (arrays or tensors)."""

        def table(values: Mapping[str, Any]) -> dict[str, Tensor]:
            return {name: torch.as_tensor(value) for name, value in values.items()}

        frames = None if windows.frames is None else torch.as_tensor(windows.frames)
        return cls(
            torch.as_tensor(windows.ids),
            torch.as_tensor(windows.dts),
            torch.as_tensor(windows.past_ids),
            torch.as_tensor(windows.past_dts),
            frames,
            table(windows.behavior),
            table(windows.behavior_offset),
            table(windows.targets),
            torch.as_tensor(windows.start),
        )

    def __len__(self) -> int:
        return len(self.ids)

    def _each(self, change: Any) -> NeuroBatch:
        def table(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: change(value) for name, value in values.items()}

        return NeuroBatch(
            change(self.ids),
            change(self.times),
            change(self.past_ids),
            change(self.past_times),
            None if self.frames is None else change(self.frames),
            table(self.behavior),
            table(self.offset),
            table(self.targets),
            None if self.row is None else change(self.row),
        )

    def to(self, device: Any, non_blocking: bool = False) -> NeuroBatch:
        """The same windows on another device."""
        return self._each(lambda t: t.to(device, non_blocking=non_blocking))

    def take(self, rows: Tensor) -> NeuroBatch:
        """Some windows, in that order."""
        return self._each(lambda t: t[rows])

    def trimmed(self, pad: int) -> NeuroBatch:
        """Without columns that are padding in every window: nothing changes but the cost, as long
        as padding is masked. One stays, so that the end of every window is among its inputs."""
        now, past = _width(self.ids, pad) + 1, max(1, _width(self.past_ids, pad))
        return replace(
            self,
            ids=self.ids[:, :now],
            times=self.times[:, :now],
            past_ids=self.past_ids[:, :past],
            past_times=self.past_times[:, :past],
        )


def _width(ids: Tensor, pad: int) -> int:
    used = (ids != pad).any(0).nonzero()
    return int(used[-1]) + 1 if len(used) else 0
