"""`FlatGradients`: `FlatMTL` as the trainer's gradients, exact over micro-batches and processes.

    first look     g_t  = sum_b sum_p grad (losses of task t in b) / c_t      at the weights
    for each task  gs_t = the same sums                                       uphill, same draws
    shared.grad    = A(g) + A(h),  h = gs - g
    head.grad      = sum_t as_t

with micro-batches b, processes p and c_t pairs of task t in the whole step, so that the result does
not depend on how a step is cut up. Chosen by `train.sharpness` together with `train.aggregator`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from polytask import rng
from polytask.errors import ConfigError
from polytask.train.aggregation import GradientCombiner
from polytask.train.config import TrainConfig
from polytask.train.distribution import Distribution
from polytask.train.flat import FlatMTL, FlatReport
from polytask.train.flat_config import SharpnessConfig
from polytask.train.gradients import (
    MicroBatches,
    StepModule,
    StepSums,
    count_pairs,
    step_module,
)
from polytask.train.jacobian import AggregatedGradients
from polytask.train.passes import Loss, Passes, Variables

if TYPE_CHECKING:
    from polytask.train.trainer import Trainer

Log = Callable[[int, FlatReport], None]


class FlatGradients(AggregatedGradients):
    """Per-task ascent, then the aggregator on both parts of the gradients found there.

    `log(step, report)` is told after every `log_every`-th step what each task's loss did uphill.
    """

    def __init__(
        self,
        model: nn.Module,
        tasks: int,
        config: TrainConfig,
        distribution: Distribution,
        sharpness: SharpnessConfig,
        log: Log | None = None,
    ) -> None:
        if config.aggregator is None:
            raise ConfigError(
                "'sharpness' needs an 'aggregator' for what it finds; 'mean' treats tasks alike"
            )
        if config.aggregate_every > 1:
            raise ConfigError("'sharpness' climbs in every step: leave 'aggregate_every' at 1")
        super().__init__(model, tasks, config, distribution)
        self.model = model
        self.log = log
        self.second = GradientCombiner(config.aggregator, config.aggregator_options)
        self.flat = FlatMTL(
            lambda matrix: matrix,
            sharpness.rho,
            sharpness.adaptive,
            sharpness.norm,
            sharpness.ascent,
            sharpness.aggregation,
        )
        self.own = Variables.of(self.shared, self._heads_of_tasks(tasks))

    @classmethod
    def of(cls, trainer: Trainer) -> FlatGradients:
        """As the trainer's configuration says; sharpness goes to its journal."""
        names, journal = trainer.tasks, trainer.journal
        assert trainer.config.sharpness is not None

        def log(step: int, report: FlatReport) -> None:
            rise = dict(zip([names[t] for t in report.tasks], report.sharpness.tolist()))
            journal.event(step, "sharpness", rise=rise)

        return cls(
            trainer.model,
            len(names),
            trainer.config,
            trainer.distribution,
            trainer.config.sharpness,
            log,
        )

    def _heads_of_tasks(self, tasks: int) -> list[list[nn.Parameter]]:
        """Each task's own parameters where the model names them, else all that are not shared."""
        head_names: Any = getattr(self.model, "head_names", None)
        if head_names is None:
            return [list(self.heads) for _ in range(tasks)]
        known = dict(self.model.named_parameters())
        heads = {id(p) for p in self.heads}
        named = [[known[name] for name in head_names(t)] for t in range(tasks)]
        return [[p for p in head if id(p) in heads] for head in named]

    def __call__(self, step: int, module: nn.Module, batches: MicroBatches, tasks: int) -> StepSums:
        inner = step_module(module)
        sums = StepSums.empty(tasks, self.distribution.device)
        pairs = self._pairs_ahead(batches, tasks)
        present = None if pairs is None else torch.nonzero(pairs > 0).flatten().tolist()
        calls = [_Call(self, inner, batch, pairs, sums) for batch in batches]
        reduce = self.distribution.sum_ if self.distribution.world > 1 else None
        passes = Passes(calls, self.own, tasks=present, reduce=reduce, check=False)
        report, gradients = self.flat.look(passes, inner.model)
        sums.reduce(self.distribution)
        self._choose_rules(report.tasks)
        with torch.random.fork_rng(devices=[]):  # rules that draw do so alike on every process
            torch.default_generator.manual_seed(rng.derive(self.config.seed, "aggregate", step))
            update = self.flat.combined(report)
        self.own.write(update, report.tasks, gradients)
        self._look(step, report)
        return sums

    def _choose_rules(self, tasks: Sequence[int]) -> None:
        """A rule with memory keeps one per set of tasks, and one for each of the two parts."""
        self.flat.combine = _Rows(self.combiner, tasks)
        self.flat.combine_flat = _Rows(self.second, tasks)

    def _look(self, step: int, report: FlatReport) -> None:
        if self.log is not None and (step + 1) % self.config.log_every == 0:
            self.log(step + 1, report)

    def losses_of(self, inner: StepModule, batch: Any, pairs: Tensor | None) -> tuple[Any, Any]:
        """Terms of a micro-batch, and its part of every task's mean loss (None where absent)."""
        terms = inner.terms(batch)
        here = count_pairs(terms, inner.tasks)
        means = self._losses(inner, terms, here if pairs is None else pairs)
        found: list[Loss] = [means[t] if n > 0 else None for t, n in enumerate(here.tolist())]
        return terms, found

    def state(self) -> dict[str, Any]:
        return {**super().state(), "second": self.second.state()}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.second.restore(state["second"])


class _Call:
    """One micro-batch as a closure; its first call also fills the step's sums."""

    def __init__(
        self,
        gradients: FlatGradients,
        inner: StepModule,
        batch: Any,
        pairs: Tensor | None,
        sums: StepSums,
    ) -> None:
        self.arguments = (inner, batch, pairs)
        self.gradients = gradients
        self.sums: StepSums | None = sums

    def __call__(self) -> Sequence[Loss]:
        terms, losses = self.gradients.losses_of(*self.arguments)
        if self.sums is not None:
            self.sums.add(terms)
            self.sums = None
        found: list[Loss] = losses
        return found


class _Rows:
    """A combiner bound to the tasks whose gradients its rows are."""

    def __init__(self, combiner: GradientCombiner, tasks: Sequence[int]) -> None:
        self.combiner = combiner
        self.tasks = tuple(tasks)
        self.name = combiner.name

    def __call__(self, matrix: Tensor) -> Tensor:
        return self.combiner.combine([matrix], self.tasks)[0][0]
