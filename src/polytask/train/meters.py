"""What happened since the last log line: sums on the device, read once a window.

Means are sums over counts, both added up over micro-batches, steps and processes first, so they are
exact whatever the sizes of the parts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polytask.train.distribution import Distribution
from polytask.train.gradients import StepSums


class Window:
    """Sums over the steps since the last `read`."""

    def __init__(self, tasks: Sequence[str], distribution: Distribution) -> None:
        self.tasks = tuple(tasks)
        self.distribution = distribution
        self.terms: dict[str, Tensor] = {}  # term -> (2, tasks): sums and pairs, this process's
        self._clear()

    def _clear(self) -> None:
        self.terms = {}
        self.norm: Tensor | None = None
        self.rate: float | None = None
        self.rows = self.tokens = 0
        self.started = time.perf_counter()

    @torch.no_grad()
    def add(self, sums: StepSums, norm: Tensor, rate: float, rows: int, tokens: int) -> None:
        """Take in one step; a step that was not finite counts for nothing."""
        if self.distribution.device.type == "cpu":
            if not bool(torch.isfinite(sums.losses).all()):
                return
            parts = sums.terms
        else:
            parts = {n: torch.nan_to_num(t, 0.0, 0.0, 0.0) for n, t in sums.terms.items()}
        for name, part in parts.items():
            old = self.terms.get(name)
            self.terms[name] = part.clone() if old is None else old.add_(part)
        self.norm, self.rate = norm, rate
        self.rows += rows
        self.tokens += tokens

    def reduced(self) -> dict[str, np.ndarray]:
        """Sums and pairs of all processes, (2, tasks) float64 per term."""
        world = self.distribution.world
        if world == 1:
            return {name: value.double().cpu().numpy() for name, value in self.terms.items()}
        names = self._all_names()
        zero = torch.zeros(2, len(self.tasks), device=self.distribution.device)
        values = [self.terms.get(name, zero).clone() for name in names]
        self.distribution.sum_(values)
        return {name: value.double().cpu().numpy() for name, value in zip(names, values)}

    def _all_names(self) -> list[str]:
        """Term names of all processes: a process may not have met a kind of task yet."""
        from accelerate.utils import gather_object

        return sorted(set(gather_object(list(self.terms))))

    def read(self) -> tuple[dict[str, Any], np.ndarray]:
        """The log line's numbers and each task's mean loss (tasks,), NaN where unseen; clears."""
        sums = self.reduced()
        seconds = max(time.perf_counter() - self.started, 1e-9)
        line: dict[str, Any] = {"loss": None, "terms": {}}
        losses = np.zeros(len(self.tasks))
        pairs = np.zeros(len(self.tasks))
        for name, (total, count) in sums.items():
            losses += total
            pairs = np.maximum(pairs, count)
            for task in np.flatnonzero(count):
                mean = float(total[task] / count[task])
                line["terms"].setdefault(self.tasks[task], {})[name] = mean
        if pairs.sum() > 0:
            line["loss"] = float(losses.sum() / pairs.sum())
        line["lr"] = self.rate
        line["grad_norm"] = None if self.norm is None else float(self.norm)
        rows, tokens = self._all_counts()
        line["rows_per_s"] = rows / seconds
        line["tokens_per_s"] = tokens / seconds
        self._clear()
        with np.errstate(invalid="ignore", divide="ignore"):
            return line, np.where(pairs > 0, losses / pairs, np.nan)

    def _all_counts(self) -> tuple[int, int]:
        if self.distribution.world == 1:
            return self.rows, self.tokens
        both = torch.tensor([self.rows, self.tokens], device=self.distribution.device)
        self.distribution.sum_([both])
        return int(both[0]), int(both[1])

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time within the block does not count against throughput."""
        begun = time.perf_counter()
        yield
        self.started += time.perf_counter() - begun

    def state(self) -> dict[str, Tensor]:
        """The open window (of all processes), for a checkpoint in its middle."""
        return {name: torch.from_numpy(value) for name, value in self.reduced().items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue the window on rank 0, which then holds everybody's part."""
        self._clear()
        if self.distribution.main:
            self.terms = {n: t.float().to(self.distribution.device) for n, t in state.items()}
