"""Task vectors with a known answer: which merge finds the planted signal under dense noise?

Each task has signal (+-1) on 5 % of the coordinates: half of those are shared by all tasks with one
sign, except for a tenth of them, where one task has the other sign; the rest are the task's own.
Everything else is noise N(0, 0.1). The oracle is, coordinate by coordinate, the mean of the
signals that agree with the majority; a merge is judged by its direction, the best scale taken out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polytask import rng
from polytask.merge.method import merge_state_dicts

WIDTH, TASKS = 20_000, 5
SIGNAL, SHARED, CONFLICT, NOISE = 0.05, 0.5, 0.1, 0.1


def task_vectors(seed: int) -> tuple[Tensor, Tensor]:
    """(TASKS, WIDTH) task vectors and (WIDTH,) the oracle."""
    draw = rng.generator(seed, "planted")
    signal = torch.zeros(TASKS, WIDTH)
    count = int(SIGNAL * WIDTH)
    order = torch.from_numpy(draw.permutation(WIDTH))
    together = order[: int(SHARED * count)]
    signs = torch.from_numpy(draw.choice([-1.0, 1.0], len(together))).float()
    signal[:, together] = signs
    contrary = together[: int(CONFLICT * len(together))]
    who = torch.from_numpy(draw.integers(0, TASKS, len(contrary)))
    signal[who, contrary] *= -1
    own = count - len(together)
    for task in range(TASKS):
        start = len(together) + task * own
        places = order[start : start + own]
        signal[task, places] = torch.from_numpy(draw.choice([-1.0, 1.0], own)).float()
    elected = signal.sum(0).sign()
    agree = (signal.sign() == elected) & (signal != 0)
    oracle = (signal * agree).sum(0) / agree.sum(0).clamp(min=1)
    noise = torch.from_numpy(NOISE * draw.standard_normal((TASKS, WIDTH))).float()
    return torch.where(signal == 0, noise, signal), oracle


def relative_error(seed: int, method: str, **params: Any) -> float:
    """|c d - oracle| / |oracle| with the best c, for the direction d that a method finds."""
    vectors, oracle = task_vectors(seed)
    base = {"w": torch.zeros(WIDTH)}
    merged = merge_state_dicts(method, [{"w": row} for row in vectors], base, weight=1.0, **params)
    found = merged["w"].double()
    size = float(found.square().sum())
    scale = float(found @ oracle.double()) / size if size else 0.0
    return float((scale * found - oracle).norm() / oracle.double().norm())
