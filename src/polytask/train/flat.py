"""FlatMTL: any way of combining task gradients, made to look for flat regions.

Phan et al., "Improving Multi-task Learning via Seeking Task-based Flat Regions" (arXiv 2211.13723).
With shared parameters th, heads w_t, losses L_t, a combiner A: (T, P) -> (P,) and a radius rho:

    g_t, a_t   = grad L_t(th, w_t)                        one forward for all tasks
    eps_t      = rho * (g_t, a_t) / ||(g_t, a_t)||        each task climbs its own hill
    gs_t, as_t = grad L_t((th, w_t) + eps_t)              one forward a task, same random numbers
    h_t        = gs_t - g_t                               raises the gradient norm: the sharp part
    th.grad    = A(g_1..g_T) + A(h_1..h_T)
    w_t.grad   = as_t

Clip after `step`, not inside it: A sees the gradients as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polytask.errors import ConfigError, NonFiniteError
from polytask.train.aggregation import GradientCombiner
from polytask.train.flat_config import Aggregation, Ascent, Norm
from polytask.train.passes import (
    Closures,
    Passes,
    PlainPass,
    TaskGradient,
    Variables,
    as_calls,
    task_name,
)
from polytask.train.sam import RandomState, ascent, frozen_statistics, perturbed

Combiner = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FlatReport:
    """What one step saw. Matrices have a row per task present, in the order of `tasks`."""

    tasks: tuple[int, ...]
    losses: Tensor  # (n,) at the weights
    perturbed_losses: Tensor  # (n,) at each task's perturbed weights
    gradients: Tensor | None  # (n, P) g; None where only the summed gradient was needed
    sam_gradients: Tensor  # (n, P) gs
    forwards: int
    backwards: int

    @property
    def sharpness(self) -> Tensor:
        """(n,) how much each loss rose on the way up."""
        return self.perturbed_losses - self.losses

    @property
    def flat_gradients(self) -> Tensor | None:
        """(n, P) h = gs - g."""
        return None if self.gradients is None else self.sam_gradients - self.gradients


class FlatMTL:
    """Per-task sharpness-aware minimisation around a gradient combiner.

    Args:
        combiner: name known to `polytask.train.aggregation`, or any (T, P) -> (P,) function.
        flat_combiner: what combines h_1..h_T; by default a second combiner of the same name, with
            a memory of its own, or the same function, which should then keep no state.
        rho: radius; 0 gives the plain combiner.
        adaptive: scale the radius by each weight's size (ASAM).
        norm: 'joint' takes the norm over shared and head gradients together, 'split' apart (which
            is closer to the paper's bound: a radius for each).
        ascent: 'per_task' is the method; 'summed' perturbs once, along the summed loss: ordinary
            SAM when the combiner is a sum.
        aggregation: 'split' is the method; 'direct' is A(gs_1..gs_T).
        names: tasks' names, for messages.

    With one task and a combiner that returns a single row unchanged (mean, sum, PCGrad, MGDA), the
    update is the SAM gradient. CAGrad scales one row by 1 + c, or (1 + c) / (1 + c^2) rescaled.
    """

    def __init__(
        self,
        combiner: str | Combiner,
        rho: float = 0.05,
        adaptive: bool = False,
        norm: Norm = "joint",
        ascent: Ascent = "per_task",
        aggregation: Aggregation = "split",
        flat_combiner: Combiner | None = None,
        names: Sequence[str] = (),
    ) -> None:
        if not rho >= 0 or rho == float("inf"):
            raise ConfigError(f"rho = {rho}: the radius should be a finite number, 0 or more")
        for label, value, known in (
            ("norm", norm, ("joint", "split")),
            ("ascent", ascent, ("per_task", "summed")),
            ("aggregation", aggregation, ("split", "direct")),
        ):
            if value not in known:
                raise ConfigError(f"{label} = '{value}' should be one of {', '.join(known)}")
        if isinstance(combiner, str):
            combiner = GradientCombiner(combiner)
        if flat_combiner is None and isinstance(combiner, GradientCombiner):
            flat_combiner = GradientCombiner(combiner.name, combiner.options)  # a memory of its own
        self.combine: Combiner = combiner
        self.combine_flat: Combiner = flat_combiner or combiner
        self.rho = float(rho)
        self.adaptive = adaptive
        self.norm: Norm = norm
        self.ascent = ascent
        self.aggregation = aggregation
        self.names = tuple(names)

    def step(
        self,
        closures: Closures,
        shared: Iterable[nn.Parameter],
        heads: Sequence[Iterable[nn.Parameter]],
        model: nn.Module | None = None,
    ) -> FlatReport:
        """Add the update to `.grad` of shared and head parameters, as `backward` would.

        Args:
            closures: one function returning every task's loss from one forward (cheapest, and
                normalisation statistics see the batch once), or one function per task. A loss is
                a scalar, or None where the batch has nothing for the task: it then takes part in
                neither call of the combiner.
            shared: parameters that several tasks use. Frozen ones are left alone.
            heads: for each task its own parameters. One tensor may serve several heads (rows of a
                stacked head): gradients are added.
            model: its running normalisation statistics are kept from the perturbed passes.

        Weights, buffers and random state end where a plain forward would have left them.

        Raises:
            ConfigError: no trainable shared parameter, or half-precision weights.
            NonFiniteError: a loss or gradient is not finite; nothing has been written.
            ValueError: no task has a loss.
        """
        own = Variables.of(shared, heads)
        passes = Passes(as_calls(closures, len(own.heads)), own, self.names)
        report, gradients = self.look(passes, model)
        self._check_finite(report)
        own.write(self.combined(report), report.tasks, gradients)
        return report

    def look(
        self, passes: Passes, model: nn.Module | None
    ) -> tuple[FlatReport, list[TaskGradient]]:
        """Both passes without writing anything: the report, and the gradients uphill per task."""
        with_plain = self.rho == 0 or self.ascent == "per_task" or self.aggregation == "split"
        first = passes.plain(per_task=with_plain)
        after = RandomState.capture(passes.own.devices)
        try:
            if self.rho == 0:
                climbed = first.gradients  # nothing to climb: one pass, the plain combiner
            elif self.ascent == "per_task":
                climbed = [self._climb(passes, first, t, model) for t in first.tasks]
            else:
                climbed = self._climb_together(passes, first, model)
        finally:
            after.restore()
        report = FlatReport(
            first.tasks,
            first.losses,
            torch.stack([gradient.loss for gradient in climbed]),
            torch.stack([g.shared for g in first.gradients]) if with_plain else None,
            torch.stack([gradient.shared for gradient in climbed]),
            passes.forwards,
            passes.backwards,
        )
        return report, climbed

    def combined(self, report: FlatReport) -> Tensor:
        """The update of the shared parameters (P,)."""
        flat = report.flat_gradients
        if self.aggregation == "direct" or flat is None or report.gradients is None:
            return self.combine(report.sam_gradients)
        plain = self.combine(report.gradients)
        return plain + self.combine_flat(flat) if bool(flat.any()) else plain  # no 0 / 0

    def _climb(
        self, passes: Passes, first: PlainPass, task: int, model: nn.Module | None
    ) -> TaskGradient:
        own = passes.own
        gradient = first.gradients[first.tasks.index(task)]
        groups = [
            (own.shared, own.split_shared(gradient.shared)),
            (own.heads[task], gradient.head),
        ]
        offsets = ascent(groups, self.rho, self.adaptive, self.norm)
        moved = [*own.shared, *own.heads[task]]
        with frozen_statistics(model), perturbed(moved, [o for part in offsets for o in part]):
            return passes.again([task])[0]

    def _climb_together(
        self, passes: Passes, first: PlainPass, model: nn.Module | None
    ) -> list[TaskGradient]:
        own = passes.own
        groups = [
            (own.shared, own.split_shared(first.summed[0])),
            (own.all_heads, first.summed[1]),
        ]
        offsets = ascent(groups, self.rho, self.adaptive, self.norm)
        moved = [*own.shared, *own.all_heads]
        with frozen_statistics(model), perturbed(moved, [o for part in offsets for o in part]):
            return passes.again(first.tasks)

    def _check_finite(self, report: FlatReport) -> None:
        parts = [report.losses, report.perturbed_losses, report.sam_gradients]
        parts += [] if report.gradients is None else [report.gradients]
        if all(bool(torch.isfinite(part).all()) for part in parts):
            return
        for row, task in enumerate(report.tasks):
            if not all(bool(torch.isfinite(part[row]).all()) for part in parts):
                raise NonFiniteError(
                    f"task {task_name(self.names, task)}: the loss ({float(report.losses[row])}), "
                    f"the loss after the ascent of rho = {self.rho} "
                    f"({float(report.perturbed_losses[row])}) or a gradient is not finite; "
                    "no gradient was written"
                )
