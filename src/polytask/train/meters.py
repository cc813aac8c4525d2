"""What happened since the last log line: sums on the device, read once a window.

Means are sums over counts, both added up over micro-batches, steps and processes first, so they are
exact whatever the sizes of the parts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from polytask.mixture.ledger import Ledger
from polytask.train.batches import StepBatches
from polytask.train.distribution import Distribution
from polytask.train.gradients import StepSums

Array = npt.NDArray[Any]


class Window:
    """Sums over the steps since the last `read`, and what the ledger and the loader are owed."""

    def __init__(
        self,
        tasks: Sequence[str],
        distribution: Distribution,
        ledger: Ledger | None = None,
        learns: bool = False,
        work: Callable[[Any], Array] | None = None,
    ) -> None:
        self.tasks = tuple(tasks)
        self.distribution = distribution
        self.ledger = ledger  # this process's part
        self.work = work  # batch -> FLOPs per task (tasks,), for the ledger
        self._flops: list[Array] = []
        self.learns = learns  # whether the loader wants to know each step's losses
        self.terms: dict[str, Tensor] = {}  # term -> (2, tasks): sums and pairs, this process's
        self._losses: list[tuple[int, Tensor]] = []  # (step, mean loss per task)
        self._seen: list[tuple[Array, Array]] = []  # task ids of pairs, and of tokens with counts
        self._clear()

    def _clear(self) -> None:
        self.terms = {}
        self.norm: Tensor | None = None
        self.rate: float | None = None
        self.rows = self.tokens = 0
        self.started = time.perf_counter()

    @torch.no_grad()
    def add(
        self, step: int, sums: StepSums, norm: Tensor, rate: float, batches: StepBatches
    ) -> None:
        """Take in one step; a step that was not finite counts for no mean."""
        if self.learns:
            self._losses.append((step, sums.losses / sums.pairs))
        self.rows += batches.rows
        self.tokens += batches.tokens
        if self.ledger is not None:
            self._seen.append(batches.seen())
            if self.work is not None:
                self._flops += [self.work(batch) for batch in batches.batches]
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

    def take_losses(self) -> list[tuple[int, Array]]:
        """(step, mean loss per task, NaN where absent) of the steps since the last call."""
        if not self._losses:
            return []
        values = torch.stack([losses for _, losses in self._losses]).double().cpu().numpy()
        found = [(step, row) for (step, _), row in zip(self._losses, values)]
        self._losses.clear()
        return found

    def _book(self, seconds: float) -> None:
        """Write the window into the ledger; its seconds are shared out by examples."""
        if self.ledger is None or not self._seen:
            return
        pairs = np.concatenate([ids for ids, _ in self._seen])
        tokens = np.concatenate([counts for _, counts in self._seen], axis=1)
        self.ledger.add(pairs)
        self.ledger.add(tokens[0], examples=0, tokens=tokens[1])
        self.ledger.spread_seconds(pairs, seconds)
        if self._flops:
            booked = np.sum(self._flops, axis=0)
            self.ledger.add(np.arange(len(booked)), examples=0, flops=booked)
            self._flops.clear()
        self._seen.clear()

    def ledger_of_all(self) -> Ledger | None:
        """The ledger so far, summed over processes (all of them have to ask)."""
        if self.ledger is None:
            return None
        self._book(0.0)
        total = Ledger(self.ledger.names, self.ledger.sizes)
        table = torch.from_numpy(self.ledger.array()).to(self.distribution.device)
        self.distribution.sum_([table])
        total.load_array(table.cpu().numpy())
        return total

    def reduced(self) -> dict[str, Array]:
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

    def read(self) -> dict[str, Any]:
        """The log line's numbers; starts the next window."""
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
        self._book(seconds)
        self._clear()
        return line

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

    def restore(self, state: Mapping[str, Tensor], ledger: Mapping[str, Any] | None) -> None:
        """Continue window and ledger on rank 0, which then holds everybody's part."""
        self._clear()
        if self.distribution.main:
            if self.ledger is not None and ledger is not None:
                self.ledger.restore(ledger)
            self.terms = {n: t.float().to(self.distribution.device) for n, t in state.items()}
