"""From a step's batches to gradients: the one interface that plain training, gradient aggregation
and sharpness-aware methods implement.

Losses are *sums* over pairs until the very end, and so are gradients: sums add up exactly over
micro-batches and processes, and one division by the global number of pairs (or tasks) makes the
mean. Nothing is ever averaged over averages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from polytask.errors import ConfigError
from polytask.models.batch import Terms
from polytask.train.distribution import Distribution
from polytask.train.weighting import Weighting

Objective = Callable[[Any, Any], Terms]


def model_terms(model: Any, batch: Any) -> Terms:
    """The default objective: the model's own."""
    result: Terms = model.terms(batch)
    return result


class StepModule(nn.Module):
    """`objective(model, batch)` as a module, so that DDP and FSDP2 see one forward pass.

    The forward returns (loss, value, task, row): the weighted sum over pairs to differentiate, and
    the parts of `Terms`.
    """

    def __init__(
        self, model: nn.Module, objective: Objective, weighting: Weighting, tasks: int, bf16: bool
    ) -> None:
        super().__init__()
        self.model = model
        self.weighting = weighting
        self.objective = objective
        self.tasks = tasks
        self.bf16 = bf16
        self.touch_all = False  # FSDP2: every process has to have a gradient for everything

    def forward(self, batch: Any, pairs: Tensor | None = None, by_task: bool = False) -> Any:
        """`by_task`: every task counts the same, so a pair's loss is divided by its task's pairs
        (`pairs`, (tasks,), of the whole step; None: those of this batch)."""
        terms = self.terms(batch)
        weights, penalty = self.weighting.weights(), self.weighting.penalty()
        if by_task:
            pairs = count_pairs(terms, self.tasks) if pairs is None else pairs
            share = pairs.clamp(min=1).reciprocal()
            weights = share if weights is None else weights * share
            penalty = None if penalty is None else penalty * share
        loss = sum_loss(terms, weights) if terms.value else self._nothing()
        if penalty is not None and terms.value:
            loss = loss + (penalty * count_pairs(terms, self.tasks)).sum()
        if self.touch_all:
            loss = loss + self._touch()
        return loss, terms.value, terms.task, terms.row

    def _nothing(self) -> Tensor:
        """The loss of a batch without any label: 0, for DDP still a result of the forward."""
        return next(p for p in self.model.parameters() if p.requires_grad).sum() * 0.0

    def _touch(self) -> Tensor:
        """0, depending on every parameter outside of the layers (which are sharded just now)."""
        mine = [p for p in self.parameters() if p.requires_grad and not hasattr(p, "full_tensor")]
        return torch.stack([p.sum() for p in mine]).sum() * 0.0

    def terms(self, batch: Any) -> Terms:
        """The objective's terms, under autocast when training in bf16."""
        if not self.bf16:
            return self.objective(self.model, batch)
        kind = next(self.model.parameters()).device.type
        with torch.autocast(kind, dtype=torch.bfloat16):
            terms = self.objective(self.model, batch)
        return Terms({n: v.float() for n, v in terms.value.items()}, terms.task, terms.row)


def sum_loss(terms: Terms, weights: Tensor | None) -> Tensor:
    """Sum over pairs of (weight of the pair's task) x (the pair's terms)."""
    parts = [
        value.sum() if weights is None else (value * weights[terms.task[name]]).sum()
        for name, value in terms.value.items()
    ]
    return torch.stack(parts).sum() if len(parts) > 1 else parts[0]


def count_pairs(terms: Terms, tasks: int) -> Tensor:
    """Pairs per task (tasks,): a pair counts once however many terms it has."""
    counts = [
        torch.zeros(tasks, device=task.device).index_add_(0, task, torch.ones_like(task).float())
        for task in terms.task.values()
    ]
    if len(counts) > 1:
        return torch.stack(counts).amax(0)
    return counts[0] if counts else torch.zeros(tasks)


def pairs_by_target(batch: Any, tasks: int) -> Tensor:
    """Pairs per task (tasks,), from the labels alone: known before the forward pass."""
    targets = getattr(batch, "targets", None)
    if targets is None:
        raise ConfigError(
            "'balance: tasks' over several micro-batches or processes needs batches with "
            f"'targets' (polytask.models.batch.Batch); got {type(batch).__name__}"
        )
    total = torch.zeros(tasks)
    for target in targets.values():
        total += torch.bincount(target.task.cpu(), minlength=tasks)
    return total


@dataclass
class StepSums:
    """What a step leaves behind besides gradients; all tensors on the device, none read yet.

    `terms` has (sum, pairs) per task for each term: (2, tasks). After `reduce` the other numbers
    are those of all processes, `terms` still those of this one.
    """

    pairs: Tensor  # (tasks,)
    losses: Tensor  # (tasks,) summed over pairs and terms; finite iff every loss is
    terms: dict[str, Tensor]
    divisor: Tensor | None = None  # () what gradients are still to be divided by; None: nothing

    @classmethod
    def empty(cls, tasks: int, device: torch.device) -> StepSums:
        return cls(torch.zeros(tasks, device=device), torch.zeros(tasks, device=device), {})

    @torch.no_grad()
    def add(self, terms: Terms) -> None:
        tasks, counts = len(self.pairs), []
        for name, value in terms.value.items():
            both = torch.stack([value.detach().float(), torch.ones_like(value).float()])
            sums = both.new_zeros(2, tasks).index_add_(1, terms.task[name], both)
            counts.append(sums[1])
            self.losses += sums[0]
            self.terms[name] = self.terms[name] + sums if name in self.terms else sums
        if counts:
            self.pairs += torch.stack(counts).amax(0) if len(counts) > 1 else counts[0]

    def reduce(self, distribution: Distribution) -> None:
        """Sum pairs and losses over processes: one message of (2 tasks) numbers."""
        distribution.sum_([self.pairs, self.losses])


class MicroBatches(Protocol):
    """The micro-batches of one step, on the device, in order; iterable more than once."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Any]: ...


class Gradients(Protocol):
    """Fills `.grad` of the parameters that train.

    `step` is the step's number, `parameters` maps names to what trains. Gradients may be left
    unnormalised: then `StepSums.divisor` says what they still have to be divided by.
    """

    def __call__(
        self, step: int, module: nn.Module, batches: MicroBatches, tasks: int
    ) -> StepSums: ...

    def state(self) -> dict[str, Any]:
        """Tensors and JSON values that a resumed run needs."""

    def restore(self, state: dict[str, Any]) -> None: ...


class SumGradients:
    """Differentiate the weighted sum of the losses: one backward pass per micro-batch.

    `module` is a `StepModule`, possibly wrapped by DDP or FSDP2, which then sum the gradients over
    processes (their mean times the number of processes) with the last micro-batch.
    """

    def __init__(self, distribution: Distribution, balance: str = "rows") -> None:
        self.distribution = distribution
        self.by_task = balance == "tasks"

    def __call__(self, step: int, module: nn.Module, batches: MicroBatches, tasks: int) -> StepSums:
        world = self.distribution.world
        sums = StepSums.empty(tasks, self.distribution.device)
        pairs = self._pairs_ahead(batches, tasks)
        for index, batch in enumerate(batches):
            with _sync(module, index == len(batches) - 1):
                loss, value, task, row = module(batch, pairs, self.by_task)
                (loss * world if world > 1 else loss).backward()
            sums.add(Terms(value, task, row))
        sums.reduce(self.distribution)
        sums.divisor = (sums.pairs > 0).sum() if self.by_task else sums.pairs.sum()
        sums.divisor = sums.divisor.clamp(min=1)
        return sums

    def _pairs_ahead(self, batches: MicroBatches, tasks: int) -> Tensor | None:
        """The step's pairs per task, where they are needed before all losses are known."""
        if not self.by_task or (len(batches) == 1 and self.distribution.world == 1):
            return None
        total = torch.stack([pairs_by_target(batch, tasks) for batch in batches]).sum(0)
        total = total.to(self.distribution.device)
        self.distribution.sum_([total])
        return total

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        return None


def _sync(module: Any, last: bool) -> Any:
    """DDP and FSDP2 send gradients with the last micro-batch only."""
    if hasattr(module, "set_requires_gradient_sync"):  # FSDP2
        module.set_requires_gradient_sync(last)
        return nullcontext()
    if not last and hasattr(module, "no_sync"):  # DDP
        return module.no_sync()
    return nullcontext()


def step_module(module: nn.Module) -> StepModule:
    """The `StepModule` inside a DDP wrapper (or itself)."""
    inner = getattr(module, "module", module)
    assert isinstance(inner, StepModule)
    return inner


def closures(
    module: StepModule, batch: Any, tasks: Sequence[int]
) -> dict[int, Callable[[], Tensor]]:
    """For each task a function that computes its mean loss on the batch afresh.

    What sharpness-aware methods call at perturbed weights; a call runs a forward pass.
    """

    def loss_of(task: int) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            terms = module.terms(batch)
            return task_means(terms, module.tasks)[task]

        return closure

    return {task: loss_of(task) for task in tasks}


def task_means(terms: Terms, tasks: int) -> Tensor:
    """Mean loss per task (tasks,), differentiable; 0 where a task has no pair."""
    return task_sums(terms, tasks) / count_pairs(terms, tasks).clamp(min=1)


def task_sums(terms: Terms, tasks: int) -> Tensor:
    """Summed loss per task (tasks,), differentiable."""
    total: Tensor | None = None
    for name, value in terms.value.items():
        part = value.new_zeros(tasks).index_add(0, terms.task[name], value)
        total = part if total is None else total + part
    return torch.zeros(tasks) if total is None else total
