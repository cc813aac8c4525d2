"""Looking at flatness and conflict without training: two meters.

`SharpnessMeter` climbs from the present weights and reports how much each task's loss rises;
weights, gradients, buffers and random state stay as they are. `GradConflictMeter` collects the
cosines between tasks' gradients from the reports of `FlatMTL.step`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from polytask.train.flat import FlatReport
from polytask.train.flat_config import Norm
from polytask.train.passes import Closures, Passes, Variables, as_calls
from polytask.train.sam import RandomState, ascent, frozen_statistics, perturbed


@dataclass(frozen=True)
class Sharpness:
    """Loss, and its rise along each task's steepest direction. Absent tasks are NaN."""

    rhos: tuple[float, ...]
    loss: Tensor  # (T,)
    rise: Tensor  # (T, R): L_t(v + eps_t(rho)) - L_t(v)
    flat_norm: Tensor  # (T, R): ||h_t|| over the shared parameters
    gradient_norm: Tensor  # (T,) over the task's own variables


class SharpnessMeter:
    """Measures every task's rise of loss at the radii given.

    The numbers depend on the batch and on training or evaluation mode; for comparable figures give
    closures over the whole training set in evaluation mode.
    """

    def __init__(
        self, rhos: Sequence[float] = (0.05, 0.1), adaptive: bool = False, norm: Norm = "joint"
    ) -> None:
        self.rhos = tuple(float(rho) for rho in rhos)
        self.adaptive = adaptive
        self.norm: Norm = norm

    def measure(
        self,
        closures: Closures,
        shared: Iterable[nn.Parameter],
        heads: Sequence[Iterable[nn.Parameter]],
        model: nn.Module | None = None,
    ) -> Sharpness:
        """Arguments as in `FlatMTL.step`; changes nothing."""
        own = Variables.of(shared, heads)
        before = RandomState.capture(own.devices)
        passes = Passes(as_calls(closures, len(own.heads)), own)
        count = len(own.heads)
        loss = torch.full((count,), float("nan"))
        norms = loss.clone()
        rise = torch.full((count, len(self.rhos)), float("nan"))
        flat = rise.clone()
        try:
            with frozen_statistics(model):
                first = passes.plain(per_task=True)
                for t, g in zip(first.tasks, first.gradients, strict=True):
                    loss[t] = g.loss
                    norms[t] = torch.stack([g.shared.norm(), *(p.norm() for p in g.head)]).norm()
                    for column, rho in enumerate(self.rhos):
                        groups = [
                            (own.shared, own.split_shared(g.shared)),
                            (own.heads[t], g.head),
                        ]
                        offsets = ascent(groups, rho, self.adaptive, self.norm)
                        moved = [*own.shared, *own.heads[t]]
                        with perturbed(moved, [o for part in offsets for o in part]):
                            up = passes.again([t])[0]
                        rise[t, column] = up.loss - g.loss
                        flat[t, column] = (up.shared - g.shared).norm()
        finally:
            before.restore()
        return Sharpness(self.rhos, loss, rise, flat, norms)


@dataclass
class GradConflictMeter:
    """Cosines between the gradients of each pair of tasks, step after step.

    Three kinds: 'loss' (g), 'flat' (h) and 'sam' (gs). A pair of which one task was absent, or has
    a zero gradient, contributes nothing that step.
    """

    tasks: int
    history: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def update(self, report: FlatReport) -> None:
        """Add one step."""
        kinds = {
            "loss": report.gradients,
            "flat": report.flat_gradients,
            "sam": report.sam_gradients,
        }
        for kind, matrix in kinds.items():
            if matrix is not None:
                self.history.setdefault(kind, []).append(self._cosines(matrix, report.tasks))

    def mean(self, kind: str) -> np.ndarray:
        """(T, T) mean cosine over the steps where a pair was measured; NaN where never."""
        stacked = np.stack(self.history[kind])
        seen = ~np.isnan(stacked)
        total = np.where(seen, stacked, 0.0).sum(0)
        return np.where(seen.any(0), total / np.maximum(seen.sum(0), 1), np.nan)

    def values(self, kind: str) -> np.ndarray:
        """All cosines of distinct pairs, for a histogram: (n,)."""
        upper = np.triu_indices(self.tasks, 1)
        every: np.ndarray = np.concatenate([step[upper] for step in self.history[kind]])
        seen: np.ndarray = every[~np.isnan(every)]
        return seen

    def _cosines(self, matrix: Tensor, tasks: Sequence[int]) -> np.ndarray:
        rows = matrix.detach().double()
        norms = rows.norm(dim=1)
        unit = rows / norms[:, None]  # a zero row gives NaN: no cosine
        found = np.full((self.tasks, self.tasks), np.nan)
        found[np.ix_(tasks, tasks)] = (unit @ unit.T).cpu().numpy()
        return found
