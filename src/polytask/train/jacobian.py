"""`AggregatedGradients`: the trainer's gradients when an aggregator is chosen.

For a step over micro-batches b on processes p, with c_t pairs of task t in the whole step:

    J_t    = sum_b sum_p  grad_shared ( sum of losses of task t in b ) / c_t
    shared.grad = aggregator(J of the tasks present)
    head.grad   = sum_t grad_head(L_t)                 heads get their own gradients, unweighted
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from polytask import rng
from polytask.errors import ConfigError
from polytask.models.batch import Terms
from polytask.train.aggregation import GradientCombiner, per_task_gradients
from polytask.train.config import TrainConfig
from polytask.train.conflict import layer_cosines
from polytask.train.distribution import Distribution
from polytask.train.gradients import (
    MicroBatches,
    StepModule,
    StepSums,
    count_pairs,
    pairs_by_target,
    step_module,
    task_sums,
)
from polytask.train.stages import matching


def shared_parameters(model: Any, patterns: Sequence[str]) -> list[str]:
    """Names of what tasks share: `patterns`, else what the model says, else everything."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    if patterns:
        every = [name for name, _ in model.named_parameters()]
        chosen = matching(every, patterns, "shared")
        return [name for name in names if name in chosen]
    if hasattr(model, "shared_names"):
        said = set(model.shared_names())
        return [name for name in names if name in said]
    return names


class AggregatedGradients:
    """Per-task gradients of the shared parameters, combined by rule.

    With `aggregate_every` = n the rule runs every n-th step; in between its last weights are used
    for one ordinary backward pass. Needs no DDP wrapper: it sums over processes itself.
    """

    def __init__(
        self, model: nn.Module, tasks: int, config: TrainConfig, distribution: Distribution
    ) -> None:
        if distribution.kind == "fsdp2":
            raise ConfigError("gradient aggregation runs on one process or with DDP, not FSDP2")
        assert config.aggregator is not None
        self.config = config
        self.distribution = distribution
        self.combiner = GradientCombiner(config.aggregator, config.aggregator_options)
        if config.aggregate_every > 1 and not self.combiner.weighted:
            raise ConfigError(
                f"'aggregate_every' = {config.aggregate_every} uses the last weights again, and "
                f"'{config.aggregator}' has no weights. Set it to 1 or choose another aggregator."
            )
        names = set(shared_parameters(model, config.shared))
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.shared = [p for n, p in trained if n in names]
        self.heads = [p for n, p in trained if n not in names]
        self.last = torch.full((tasks,), torch.nan, device=distribution.device)  # weights

    def __call__(self, step: int, module: nn.Module, batches: MicroBatches, tasks: int) -> StepSums:
        inner = step_module(module)
        sums = StepSums.empty(tasks, self.distribution.device)
        pairs = self._pairs_ahead(batches, tasks)
        full = step % self.config.aggregate_every == 0 or bool(self.last.isnan().all())
        rows: list[Tensor] = []
        present: list[int] = []
        for batch in batches:
            terms = inner.terms(batch)
            pairs = count_pairs(terms, tasks) if pairs is None else pairs
            present = present or torch.nonzero(pairs > 0).flatten().tolist()
            losses = self._losses(inner, terms, pairs)
            if full:
                rows = self._add(rows, losses, count_pairs(terms, tasks), present)
            else:
                self._backward_weighted(losses, pairs)
            sums.add(terms)
        self.distribution.sum_([*rows, *self._head_gradients(), *self._shared_gradients(full)])
        sums.reduce(self.distribution)
        if full and rows:
            self._combine(step, rows, present)
        return sums

    def _losses(self, inner: StepModule, terms: Terms, pairs: Tensor) -> Tensor:
        """This micro-batch's part of each task's mean loss (tasks,)."""
        losses = task_sums(terms, len(pairs)).to(pairs.device) / pairs.clamp(min=1)
        weights = inner.weighting.weights()
        return losses if weights is None else losses * weights

    def _pairs_ahead(self, batches: MicroBatches, tasks: int) -> Tensor | None:
        if len(batches) == 1 and self.distribution.world == 1:
            return None
        total = torch.stack([pairs_by_target(batch, tasks) for batch in batches]).sum(0)
        total = total.to(self.distribution.device)
        self.distribution.sum_([total])
        return total

    def _add(
        self, rows: list[Tensor], losses: Tensor, here: Tensor, present: list[int]
    ) -> list[Tensor]:
        """Add the gradients of the tasks that this micro-batch has to the step's rows."""
        local = [t for t in torch.nonzero(here > 0).flatten().tolist() if t in present]
        _accumulate(losses.sum(), self.heads, keep=bool(self.shared))
        if not self.shared or not present:
            return rows
        found = per_task_gradients([losses[t] for t in local], self.shared, self.config.chunk)
        if not rows and local == present:
            return found
        rows = rows or [p.new_zeros(len(present), *p.shape) for p in self.shared]
        where = torch.tensor([present.index(t) for t in local], device=losses.device)
        for row, part in zip(rows, found):
            row.index_add_(0, where, part)
        return rows

    def _combine(self, step: int, rows: list[Tensor], present: list[int]) -> None:
        seed = rng.derive(self.config.seed, "aggregate", step)  # the same on every process
        torch.default_generator.manual_seed(seed)
        gradients, weights = self.combiner.combine(rows, present)
        used = torch.stack([r.abs().amax() for r in rows]).ne(0).tolist()  # NaN counts as used
        for parameter, gradient, reached in zip(self.shared, gradients, used):
            parameter.grad = gradient if reached else None
        if weights is not None:
            self.last[torch.tensor(present, device=self.last.device)] = weights.to(self.last)

    def _backward_weighted(self, losses: Tensor, pairs: Tensor) -> None:
        """One backward pass: the last weights for what is shared, none for the heads."""
        fallback = self.last.nanmean()  # for a task that no aggregation has seen yet
        weights = torch.where(self.last.isnan(), fallback, self.last) * (pairs > 0)
        _accumulate(losses.sum(), self.heads, keep=bool(self.shared))
        _accumulate((losses * weights).sum(), self.shared, keep=False)

    def _head_gradients(self) -> list[Tensor]:
        return self._present_gradients(self.heads)

    def _shared_gradients(self, full: bool) -> list[Tensor]:
        return [] if full else self._present_gradients(self.shared)

    def _present_gradients(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        """Gradients to sum over processes; every process sends the same list."""
        if self.distribution.world > 1 and parameters:
            used = torch.tensor([float(p.grad is not None) for p in parameters])
            used = used.to(self.distribution.device)
            self.distribution.sum_([used])
            for parameter, count in zip(parameters, used.tolist()):
                if count and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        return [p.grad for p in parameters if p.grad is not None]

    def state(self) -> dict[str, Any]:
        return {
            "last": [None if w != w else w for w in self.last.tolist()],
            "memory": self.combiner.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.last.copy_(torch.tensor([torch.nan if w is None else w for w in state["last"]]))
        self.combiner.restore(state["memory"])


def _accumulate(loss: Tensor, parameters: list[nn.Parameter], keep: bool) -> None:
    """Add the gradient of `loss` to `.grad`, leaving unused parameters alone."""
    if not parameters or not loss.requires_grad:
        return
    found = torch.autograd.grad(loss, parameters, retain_graph=keep, allow_unused=True)
    for parameter, gradient in zip(parameters, found):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def look_at_conflict(
    model: nn.Module, inner: StepModule, batches: MicroBatches, config: TrainConfig
) -> dict[str, Any] | None:
    """Gradient cosines of the tasks in this process's first micro-batch; None when nothing that is
    shared trains."""
    names = shared_parameters(model, config.shared)
    if not names:
        return None
    terms = inner.terms(next(iter(batches)))
    losses = task_sums(terms, inner.tasks)
    present = torch.nonzero(count_pairs(terms, inner.tasks) > 0).flatten().tolist()
    parameters = dict(model.named_parameters())
    jacobians = per_task_gradients(
        [losses[t] for t in present], [parameters[n] for n in names], config.chunk
    )
    return layer_cosines(names, jacobians, present)
