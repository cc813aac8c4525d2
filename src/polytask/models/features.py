"""What the shared part of a model hands to its heads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from polytask.models.stems.entries import Entries, HostArray
from polytask.models.stems.splice import Layout


@dataclass(frozen=True)
class Features:
    """Hidden states of a batch, and where everything stands in them.

    hidden   (S, L, D) after the trunk's final norm
    pooled   (S, D) one vector per sequence
    lm_weight  (V, D) scores of generated tokens are hidden @ lm_weight'; None without text
    decoded  (pairs, T, D) decoder states of generation pairs (encoder-decoder models)
    balance  (tasks,) balance loss of the routers, weighted (models with experts)
    """

    hidden: Tensor
    pooled: Tensor
    layout: Layout
    entries: dict[str, Entries]
    lm_weight: Tensor | None = None
    lm_bias: Tensor | None = None
    decoded: Tensor | None = None
    balance: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """What losses depend on besides the heads' own parameters, none computed from another:
        pass these as `features` to `torchjd.autojac.mtl_backward`."""
        found = [self.hidden, self.pooled, self.lm_weight, self.lm_bias, self.decoded, self.balance]
        return [t for t in found if t is not None and t.requires_grad]

    def places(self, sequence: HostArray, modality: str, step: HostArray) -> HostArray:
        """Flat places in `hidden` of tokens `step` (P, T) within the first entry of a modality of
        each `sequence` (P,). Raises `ValueError` if a sequence has none."""
        return (sequence * self.layout.width + self.starts(sequence, modality))[:, None] + step

    def starts(self, sequence: HostArray, modality: str) -> HostArray:
        """(P,) where the first entry of a modality begins in each sequence."""
        found: HostArray = self.layout.start[modality][self.entry(sequence, modality)]
        return found

    def entry(self, sequence: HostArray, modality: str) -> HostArray:
        """(P,) index of the first entry of a modality in each sequence."""
        if modality not in self.layout.sequence:
            raise ValueError(f"a head needs {modality} inputs and the batch has none")
        entry: HostArray = self.layout.entry(modality)[sequence]
        if (entry < 0).any():
            missing = int(sequence[np.argmax(entry < 0)])
            raise ValueError(f"a head needs {modality} inputs; sequence {missing} has none")
        return entry
