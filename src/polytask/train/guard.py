"""A non-finite loss or gradient stops training before the update and names who it was.

The gradient norm is computed anyway for clipping; it is finite only if every gradient is. On a CPU
it is looked at directly. On an accelerator reading it would make the host wait every step, so a
flag on the device makes the fused optimiser skip its update (from the bad step on, unless skipping
is allowed), and the flags are read together with the logged losses. Either way the weights stay
what they were, and since a batch is a function of the step, the bad step can be run again to find
the task, term and rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polytask.models.batch import Terms
from polytask.train.gradients import StepModule

SHOWN = 8  # row ids in a message


class Guard:
    """Decides before each update whether it may happen."""

    def __init__(self, device: torch.device, direct: bool, max_skipped: int) -> None:
        self.direct = direct  # look at the norm on the host each step
        self.max_skipped = max_skipped
        self.skipped = 0
        self._bad = torch.zeros((), device=device)
        self._flags: list[tuple[int, Tensor]] = []

    def allows(
        self, step: int, norm: Tensor, losses: Tensor, optimizer: torch.optim.Optimizer
    ) -> bool:
        """Whether to call the optimiser. On an accelerator: always, having told it on the device
        whether to skip."""
        if self.direct:
            finite = math.isfinite(float(norm)) and math.isfinite(float(losses.sum()))
            if not finite:
                self._flags.append((step, torch.ones(())))
            return finite
        bad = (~torch.isfinite(norm + losses.sum())).float()
        self._flags.append((step, bad))
        self._bad = bad if self.max_skipped else torch.maximum(self._bad, bad)
        optimizer.found_inf = self._bad  # type: ignore[attr-defined]
        optimizer.grad_scale = None  # type: ignore[attr-defined]
        return True

    def bad_steps(self) -> list[int]:
        """Steps since the last call that were not finite; on an accelerator this waits for it."""
        if not self._flags:
            return []
        flags = torch.stack([flag for _, flag in self._flags]).tolist()
        found = [step for (step, _), flag in zip(self._flags, flags) if flag]
        self._flags.clear()
        self.skipped += len(found)
        return found

    @property
    def exhausted(self) -> bool:
        return self.skipped > self.max_skipped


@dataclass(frozen=True)
class Culprit:
    """Who was not finite: 'loss' or 'gradient', of which task and term, on which rows."""

    what: str
    task: str
    term: str
    rows: tuple[int, ...]

    def __str__(self) -> str:
        more = f", ... ({len(self.rows)} rows)" if len(self.rows) > SHOWN else ""
        rows = ", ".join(map(str, self.rows[:SHOWN])) + more
        return f"{self.what} of task '{self.task}', term '{self.term}', rows {rows or 'unknown'}"

    def event(self) -> dict[str, Any]:
        return {
            "what": self.what,
            "task": self.task,
            "term": self.term,
            "rows": list(self.rows[:SHOWN]),
            "row_count": len(self.rows),
        }


def find_culprits(
    module: StepModule, batches: Iterable[Any], tasks: Sequence[str]
) -> list[Culprit]:
    """Run a step's batches again and name what is not finite; empty when all is finite now."""
    found: list[Culprit] = []
    for batch in batches:
        with _watched(module.model, batch) as outputs:
            terms = module.terms(batch)
        bad = _bad_losses(terms, tasks)
        if not bad and not module.touch_all:  # gradients of shards are out of reach here
            bad = _bad_gradients(module.model, batch, terms, outputs, tasks)
        found += bad
    return found


def _bad_losses(terms: Terms, tasks: Sequence[str]) -> list[Culprit]:
    found = []
    for name, value in terms.value.items():
        bad = ~torch.isfinite(value.detach())
        found += _named("loss", terms, name, bad, tasks)
    return found


def _named(what: str, terms: Terms, term: str, bad: Tensor, tasks: Sequence[str]) -> list[Culprit]:
    """Culprits of one term: its bad pairs, by task."""
    found = []
    for task in torch.unique(terms.task[term][bad]).tolist():
        rows = torch.unique(terms.row[term][bad & (terms.task[term] == task)])
        found.append(Culprit(what, tasks[task], term, tuple(rows.tolist())))
    return found


@contextmanager
def _watched(model: nn.Module, batch: Any) -> Iterator[list[Tensor]]:
    """Collects the module outputs that have one entry per sequence: their gradients stay apart by
    row, while those of parameters are sums over rows (and 0 times infinity is NaN for everyone)."""
    count = len(getattr(batch, "row", ()))
    outputs: list[Tensor] = []

    def keep(_: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad and output.shape[:1] == (count,):
            outputs.append(output)

    handles = [part.register_forward_hook(keep) for part in model.modules()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _bad_gradients(
    model: nn.Module, batch: Any, terms: Terms, outputs: list[Tensor], tasks: Sequence[str]
) -> list[Culprit]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = torch.stack([value.sum() for value in terms.value.values()]).sum()
    found = torch.autograd.grad(total, [*parameters, *outputs], allow_unused=True)
    if all(bool(torch.isfinite(g).all()) for g in found if g is not None):
        return []
    bad = [~torch.isfinite(g.flatten(1)).all(1) for g in found[len(parameters) :] if g is not None]
    rows = batch.row[torch.stack(bad).any(0)] if bad else torch.empty(0, dtype=torch.int64)
    culprits = []
    for term in terms.value:
        hit = torch.isin(terms.row[term], rows) if len(rows) else torch.ones_like(terms.row[term])
        culprits += _named("gradient", terms, term, hit.bool(), tasks)
    return culprits
