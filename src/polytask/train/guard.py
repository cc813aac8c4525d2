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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polytask.models.batch import Terms
from polytask.train.gradients import StepModule, task_sums

SHOWN = 8  # row ids in a message
SEARCHED = 256  # pairs differentiated one by one to find a culprit


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
        terms = module.terms(batch)
        found += _bad_losses(terms, tasks) or _bad_gradients(module.model, terms, tasks)
    return found


def _bad_losses(terms: Terms, tasks: Sequence[str]) -> list[Culprit]:
    found = []
    for name, value in terms.value.items():
        bad = ~torch.isfinite(value.detach())
        for task in torch.unique(terms.task[name][bad]).tolist():
            rows = torch.unique(terms.row[name][bad & (terms.task[name] == task)]).tolist()
            found.append(Culprit("loss", tasks[task], name, tuple(rows)))
    return found


def _bad_gradients(model: nn.Module, terms: Terms, tasks: Sequence[str]) -> list[Culprit]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    losses = task_sums(terms, len(tasks))
    found = []
    for name, value in terms.value.items():
        for task in torch.unique(terms.task[name]).tolist():
            if _finite(losses[task], parameters):
                continue
            where = torch.nonzero(terms.task[name] == task).flatten()[:SEARCHED].tolist()
            rows = [int(terms.row[name][i]) for i in where if not _finite(value[i], parameters)]
            if rows:
                found.append(Culprit("gradient", tasks[task], name, tuple(dict.fromkeys(rows))))
    return found


def _finite(loss: Tensor, parameters: list[nn.Parameter]) -> bool:
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return all(bool(torch.isfinite(g).all()) for g in found if g is not None)
