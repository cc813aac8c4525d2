"""Who uses which expert: counts per layer, task and expert, and what follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from polytask.errors import ConfigError
from polytask.models.experts.balance import mutual_information
from polytask.models.experts.moe import RoutingRecord

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class ExpertUsage:
    """Counts of (token, slot) pairs, added up over passes.

    count     block -> (tasks, experts) pairs that were run
    weight    block -> (tasks, experts) sum of their weights
    tokens    (tasks,) valid tokens, of one layer
    overflow  block -> pairs that found no room
    """

    def __init__(self, tasks: Sequence[str], experts: int) -> None:
        self.tasks = tuple(tasks)
        self.experts = experts
        self.count: dict[int, Counts] = {}
        self.weight: dict[int, Floats] = {}
        self.overflow: dict[int, int] = {}
        self.tokens = np.zeros(len(self.tasks), np.int64)

    @torch.no_grad()
    def add(self, record: RoutingRecord) -> None:
        """Take in one pass."""
        size = (len(self.tasks), self.experts)
        for number, (layer, routed) in enumerate(record.routed.items()):
            kept = torch.ones_like(routed.index, dtype=torch.bool)
            kept = kept if routed.kept is None else routed.kept
            task = routed.task
            if task is None:
                task = torch.zeros_like(routed.index[:, 0])
            cell = (task[:, None] * self.experts + routed.index)[kept].cpu().numpy()
            weight = routed.weight[kept].double().cpu().numpy()
            cells = size[0] * size[1]
            found = np.bincount(cell, minlength=cells).reshape(size)
            sums = np.bincount(cell, weight, cells).reshape(size)
            self.count[layer] = self.count.get(layer, np.zeros(size, np.int64)) + found
            self.weight[layer] = self.weight.get(layer, np.zeros(size)) + sums
            self.overflow[layer] = self.overflow.get(layer, 0) + int(routed.overflow)
            if number == 0:
                chosen = task if routed.valid is None else task[routed.valid]
                self.tokens += np.bincount(chosen.cpu().numpy(), minlength=size[0])

    def share(self, layer: int) -> Floats:
        """(tasks, experts) of a task's pairs; rows sum to 1 (0 where a task had none)."""
        count = self.count[layer].astype(np.float64)
        found: Floats = count / np.maximum(1, count.sum(1, keepdims=True))
        return found

    def entropy(self, layer: int) -> Floats:
        """(tasks,) of the share in nats: log(experts) when even, log(k) when collapsed."""
        share = self.share(layer)
        logs = np.log(np.where(share > 0, share, 1.0))
        found: Floats = -(share * logs).sum(1)
        return found

    def information(self, layer: int) -> float:
        """I(task; expert) in nats, every task weighing the same."""
        share = self.share(layer)
        return float(mutual_information(torch.from_numpy(share / max(1, len(share)))))

    def used(self, task: str, threshold: float = 0.0) -> tuple[tuple[int, ...], ...]:
        """Per layer the experts that got more than `threshold` of the task's pairs."""
        if task not in self.tasks:
            raise ConfigError(f"no task '{task}' among {', '.join(self.tasks)}")
        row = self.tasks.index(task)
        return tuple(
            tuple(int(e) for e in np.flatnonzero(self.share(layer)[row] > threshold))
            for layer in self.count
        )

    def overlap(self) -> Floats:
        """(tasks, tasks) sum over experts of min(share, share), mean over layers: 1 = the same."""
        found = []
        for layer in self.count:
            share = self.share(layer)
            found.append(np.minimum(share[:, None], share[None]).sum(-1))
        mean: Floats = np.mean(found, 0)
        return mean

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "tasks": list(self.tasks),
            "experts": self.experts,
            "tokens": self.tokens.tolist(),
            "layers": [
                {
                    "block": layer,
                    "share": np.round(self.share(layer), 6).tolist(),
                    "entropy": np.round(self.entropy(layer), 6).tolist(),
                    "information": round(self.information(layer), 6),
                    "overflow": self.overflow[layer],
                }
                for layer in self.count
            ],
            "overlap": np.round(self.overlap(), 6).tolist() if self.count else [],
        }
