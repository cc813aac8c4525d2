"""Small models and batches that tests of Neuroformer share."""

from __future__ import annotations

from typing import Any

import torch

from polytask.models.neuro import (
    GroupConfig,
    NeuroBatch,
    NeuroformerConfig,
    NeuroformerModel,
    TargetConfig,
    VideoConfig,
)

UNITS, TIMES = 5, 6


def small(**changes: Any) -> NeuroformerConfig:
    base: dict[str, Any] = {
        "units": UNITS,
        "times": TIMES,
        "block": 8,
        "past_block": 9,
        "dim": 16,
        "heads": 2,
        "dropout": 0.0,
        "encoder_layers": 1,
        "past_layers": 2,
        "layers": 1,
    }
    return NeuroformerConfig(**{**base, **changes})


def rich(**changes: Any) -> NeuroformerConfig:
    """Every modality."""
    base: dict[str, Any] = {
        "video": VideoConfig(frames=4, height=6, width=6, kernel=(2, 3, 3), layers=2),
        "groups": (
            GroupConfig(name="body", variables=("pupil", "phi"), layers=1),
            GroupConfig(name="world", variables=("light",), layers=2),
        ),
        "targets": {
            "speed": TargetConfig(),
            "state": TargetConfig(kind="classification", classes=3),
        },
        "align": ("spikes", "video", "pupil"),
    }
    return small(**{**base, **changes})


def moved(config: NeuroformerConfig, seed: int = 0, scale: float = 0.3) -> NeuroformerModel:
    """A model whose parameters are all away from their start, so that nothing is 0 by chance."""
    model = NeuroformerModel(config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tokens(counts: list[int], width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [SOS, spikes, EOS, PAD ..] of ids and times."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((len(counts), width), UNITS + 2)
    times = torch.full((len(counts), width), TIMES + 2)
    for row, count in enumerate(counts):
        ids[row, 0], times[row, 0] = UNITS, 0
        ids[row, 1 : count + 1] = torch.randint(0, UNITS, (count,), generator=generator)
        drawn = torch.randint(0, TIMES, (count,), generator=generator)
        times[row, 1 : count + 1] = drawn.sort().values
        ids[row, count + 1], times[row, count + 1] = UNITS + 1, TIMES + 1
    return ids, times


def batch(counts: tuple[int, ...] = (3, 0, 6, 1), full: bool = False, seed: int = 0) -> NeuroBatch:
    rows = len(counts)
    ids, times = tokens(list(counts), 9, seed)
    past_ids, past_times = tokens([c % 5 for c in range(2, 2 + rows)], 9, seed + 1)
    if not full:
        return NeuroBatch(ids, times, past_ids, past_times, row=torch.arange(rows))
    g = torch.Generator().manual_seed(seed + 2)
    return NeuroBatch(
        ids,
        times,
        past_ids,
        past_times,
        torch.randn(rows, 4, 6, 6, generator=g),
        {
            "pupil": torch.randn(rows, 2, generator=g),
            "phi": torch.randn(rows, 1, generator=g),
            "light": torch.randn(rows, 3, generator=g),
        },
        {
            "pupil": torch.tensor([0.0, 0.05]).expand(rows, 2),
            "phi": torch.zeros(rows, 1),
            "light": torch.tensor([0.0, 0.02, 0.04]).expand(rows, 3),
        },
        {
            "speed": torch.randn(rows, generator=g),
            "state": torch.randint(0, 3, (rows,), generator=g),
        },
        torch.arange(rows),
    )
