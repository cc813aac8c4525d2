"""One step's forward and backward passes, task by task: gradients kept apart, randomness replayed.

`Variables` are the parameters a step may move, `Passes` runs the user's closures over them. Used by
`FlatMTL`, which writes an update, and by `SharpnessMeter`, which only looks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polytask.errors import ConfigError, NonFiniteError
from polytask.train.sam import RandomState

Loss = Tensor | None  # None: the batch has nothing for this task
JointClosure = Callable[[], Sequence[Loss]]
Closures = JointClosure | Sequence[Callable[[], Loss]]


@dataclass(frozen=True)
class TaskGradient:
    """One task's loss and gradient; `reached` says which shared parameters it depends on."""

    loss: Tensor
    shared: Tensor  # (P,)
    head: list[Tensor]
    reached: list[bool]


@dataclass(frozen=True)
class PlainPass:
    tasks: tuple[int, ...]
    losses: Tensor  # (n,)
    gradients: list[TaskGradient]  # empty when only the sum was asked for
    summed: tuple[Tensor, list[Tensor]]  # shared (P,), all heads


class Variables:
    """The parameters of a step: shared, per task, and their flat view."""

    def __init__(self, shared: list[nn.Parameter], heads: list[list[nn.Parameter]]) -> None:
        self.shared = shared
        self.heads = heads
        self.all_heads = list({id(p): p for head in heads for p in head}.values())
        self.devices = {p.device for p in [*shared, *self.all_heads]}
        self._sizes = [p.numel() for p in shared]

    @classmethod
    def of(
        cls, shared: Iterable[nn.Parameter], heads: Sequence[Iterable[nn.Parameter]]
    ) -> Variables:
        trunk = [p for p in shared if p.requires_grad]
        if not trunk:
            raise ConfigError("no shared parameter is trainable: there is nothing to combine")
        tops = [[p for p in head if p.requires_grad] for head in heads]
        for p in [*trunk, *(p for head in tops for p in head)]:
            if p.dtype not in (torch.float32, torch.float64):
                raise ConfigError(
                    f"a parameter of shape {tuple(p.shape)} is {p.dtype}: a perturbation would be "
                    "lost in rounding. Keep float32 weights and use autocast for the forward"
                )
        both = {id(p) for p in trunk} & {id(p) for head in tops for p in head}
        if both:
            raise ConfigError(f"{len(both)} parameters are given both as shared and as a head's")
        return cls(trunk, tops)

    def split_shared(self, flat: Tensor) -> list[Tensor]:
        parts = torch.split(flat, self._sizes)
        return [part.view_as(p) for part, p in zip(parts, self.shared, strict=True)]

    def write(
        self, update: Tensor, heads: dict[int, list[Tensor]], gradients: Sequence[TaskGradient]
    ) -> None:
        """Add to `.grad`; a parameter that no task reaches keeps the gradient it had (or None)."""
        for index, (parameter, part) in enumerate(
            zip(self.shared, self.split_shared(update), strict=True)
        ):
            if any(gradient.reached[index] for gradient in gradients):
                _accumulate(parameter, part)
        for task, parts in heads.items():
            for parameter, part in zip(self.heads[task], parts, strict=True):
                _accumulate(parameter, part)


class Passes:
    """Runs the closures, counts passes, and replays each task's random numbers."""

    def __init__(self, closures: Closures, own: Variables, names: Sequence[str]) -> None:
        self.joint: JointClosure | None = closures if callable(closures) else None
        self.single = () if callable(closures) else tuple(closures)
        if self.joint is None and len(self.single) != len(own.heads):
            raise ConfigError(f"{len(self.single)} closures for {len(own.heads)} heads")
        self.own = own
        self.names = names
        self.forwards = 0
        self.backwards = 0
        self._states: dict[int, RandomState] = {}

    def plain(self, per_task: bool) -> PlainPass:
        losses = self._first_losses()
        tasks = tuple(t for t, loss in enumerate(losses) if loss is not None)
        if not tasks:
            raise ValueError("no task has a loss in this batch")
        present = [loss for loss in losses if loss is not None]
        values = torch.stack([loss.detach() for loss in present])
        self._check(tasks, present)
        if per_task:
            gradients = self._backward(list(zip(tasks, present, strict=True)))
            return PlainPass(tasks, values, gradients, self._sum(tasks, gradients))
        variables = [*self.own.shared, *self.own.all_heads]
        total = torch.stack(present).sum()
        self.backwards += 1
        found = torch.autograd.grad(total, variables, allow_unused=True)
        filled = [_or_zero(g, p) for g, p in zip(found, variables, strict=True)]
        cut = len(self.own.shared)
        return PlainPass(tasks, values, [], (_flat(filled[:cut]), filled[cut:]))

    def again(self, tasks: Sequence[int]) -> list[TaskGradient]:
        """Losses and gradients of `tasks` at the present weights, with the first pass's draws."""
        if self.joint is not None:
            self._states[-1].restore()
            self.forwards += 1
            every = self.joint()
            losses = [every[t] for t in tasks]
        else:
            losses = []
            for t in tasks:
                self._states[t].restore()
                self.forwards += 1
                losses.append(self.single[t]())
        pairs = []
        for t, loss in zip(tasks, losses, strict=True):
            if loss is None:
                raise ValueError(
                    f"task {task_name(self.names, t)} had a loss in the first pass and none in the "
                    "second: a closure should see the same batch every time"
                )
            pairs.append((t, loss))
        return self._backward(pairs)

    def _first_losses(self) -> list[Loss]:
        if self.joint is not None:
            self._states[-1] = RandomState.capture(self.own.devices)
            self.forwards += 1
            losses = list(self.joint())
            if len(losses) != len(self.own.heads):
                raise ConfigError(f"{len(losses)} losses for {len(self.own.heads)} heads")
            return losses
        losses = []
        for t, closure in enumerate(self.single):
            self._states[t] = RandomState.capture(self.own.devices)
            losses.append(closure())
            self.forwards += losses[-1] is not None
        return losses

    def _check(self, tasks: Sequence[int], losses: Sequence[Tensor]) -> None:
        for t, loss in zip(tasks, losses, strict=True):
            name = task_name(self.names, t)
            if loss.ndim != 0:
                raise ValueError(f"the loss of task {name} has shape {tuple(loss.shape)}, not ()")
            if not loss.requires_grad:
                raise ConfigError(f"the loss of task {name} depends on no trainable parameter")
            if not bool(torch.isfinite(loss.detach())):
                raise NonFiniteError(f"the loss of task {name} is {float(loss.detach())}")

    def _backward(self, pairs: Sequence[tuple[int, Tensor]]) -> list[TaskGradient]:
        gradients = []
        cut = len(self.own.shared)
        for position, (t, loss) in enumerate(pairs):
            variables = [*self.own.shared, *self.own.heads[t]]
            self.backwards += 1
            found = torch.autograd.grad(
                loss, variables, retain_graph=position + 1 < len(pairs), allow_unused=True
            )
            filled = [_or_zero(g, p) for g, p in zip(found, variables, strict=True)]
            reached = [g is not None for g in found[:cut]]
            gradients.append(
                TaskGradient(loss.detach(), _flat(filled[:cut]), filled[cut:], reached)
            )
        return gradients

    def _sum(
        self, tasks: Sequence[int], gradients: Sequence[TaskGradient]
    ) -> tuple[Tensor, list[Tensor]]:
        shared = torch.stack([g.shared for g in gradients]).sum(0)
        total = {id(p): torch.zeros_like(p) for p in self.own.all_heads}
        for t, gradient in zip(tasks, gradients, strict=True):
            for parameter, part in zip(self.own.heads[t], gradient.head, strict=True):
                total[id(parameter)] = total[id(parameter)] + part
        return shared, [total[id(p)] for p in self.own.all_heads]


def _accumulate(parameter: nn.Parameter, gradient: Tensor) -> None:
    part = gradient.to(parameter.dtype)
    parameter.grad = part.clone() if parameter.grad is None else parameter.grad + part


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    device = tensors[0].device
    return torch.cat([t.reshape(-1).to(device) for t in tensors])


def _or_zero(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if gradient is None else gradient


def task_name(names: Sequence[str], task: int) -> str:
    return f"'{names[task]}'" if task < len(names) else str(task)
