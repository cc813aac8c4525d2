"""Small recordings that tests of Neuroformer share."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from polytask.data.spikes import Recording
from polytask.infer.neuro import Neuroformer


@cache
def recording(units: int = 6, seconds: float = 30.0, seed: int = 0) -> Recording:
    """Unit 0 makes unit 1 fire 30 ms later; speed drives the last two; frames and labels."""
    draw = np.random.default_rng(seed)
    steps = round(seconds * 100)
    speed = np.sin(np.arange(steps // 5) / 7) + 0.1 * draw.normal(size=steps // 5)
    counts = (draw.random((units, steps)) < 0.04).astype(int)
    counts[1, 3:] |= counts[0, :-3]
    gain = np.repeat(0.10 * (speed > 0), 5)
    counts[-2:] |= draw.random((2, steps)) < gain
    frames = draw.normal(size=(steps // 5, 6, 6)).astype(np.float32)
    return Recording.from_arrays(
        counts,
        0.01,
        frames=frames,
        frame_rate=20.0,
        behavior={
            "speed": 10 + 3 * speed,
            "pupil": np.cos(np.arange(steps // 5) / 5),
            "state": np.where(speed > 0, "run", "rest"),
        },
        dt_b=0.05,
    )


def neuro(**changes: Any) -> Neuroformer:
    base: dict[str, Any] = {
        "block": 16, "prev_block": 16, "dim": 16, "heads": 2, "dropout": 0.0,
        "targets": {"speed": "regression", "state": "classification"},
    }  # fmt: skip
    seed = changes.pop("seed", 0)
    return Neuroformer(recording(), seed=seed, device="cpu", **{**base, **changes})


EVERYTHING: dict[str, Any] = {
    "frame_window": 0.2,
    "kernel": (2, 3, 3),
    "inputs": {"body": ("pupil",)},
    "align": ("spikes", "video", "pupil"),
}
