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
Reduce = Callable[[list[Tensor]], None]  # sums tensors over processes, in place


@dataclass
class TaskGradient:
    """One task's loss and gradient; `reached` says which parameters it depends on."""

    loss: Tensor  # ()
    shared: Tensor  # (P,)
    head: list[Tensor]
    reached: list[bool]  # shared parameters, then the head's

    def add(self, other: TaskGradient) -> None:
        """Gradients and losses of several micro-batches are sums."""
        self.loss = self.loss + other.loss
        self.shared = self.shared + other.shared
        self.head = [a + b for a, b in zip(self.head, other.head, strict=True)]
        self.reached = [a or b for a, b in zip(self.reached, other.reached, strict=True)]


@dataclass(frozen=True)
class PlainPass:
    """What the first look found, at the weights themselves."""

    tasks: tuple[int, ...]
    losses: Tensor  # (n,)
    gradients: list[TaskGradient]  # per task of `tasks`; empty when only the sum was asked for
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
        """Those that train; `ConfigError` for half precision, overlap, or nothing shared."""
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
        """A vector (P,) as tensors of the shared parameters' shapes."""
        parts = torch.split(flat, self._sizes)
        return [part.view_as(p) for part, p in zip(parts, self.shared, strict=True)]

    def write(
        self, update: Tensor, tasks: Sequence[int], gradients: Sequence[TaskGradient]
    ) -> None:
        """Add to `.grad`; a parameter that no task reaches keeps what it had (None, mostly)."""
        cut = len(self.shared)
        for index, part in enumerate(self.split_shared(update)):
            if any(gradient.reached[index] for gradient in gradients):
                _accumulate(self.shared[index], part)
        for task, gradient in zip(tasks, gradients, strict=True):
            for index, part in enumerate(gradient.head):
                if gradient.reached[cut + index]:
                    _accumulate(self.heads[task][index], part)


class Passes:
    """Runs closures, counts passes, replays random numbers, and adds up micro-batches.

    `calls` each run one forward and return a loss (or None) per task; a task's loss is the sum over
    calls. `tasks` fixes which tasks count (several processes must agree); None takes those that
    have a loss. `reduce` sums gradients and losses over processes.
    """

    def __init__(
        self,
        calls: Sequence[JointClosure],
        own: Variables,
        names: Sequence[str] = (),
        tasks: Sequence[int] | None = None,
        reduce: Reduce | None = None,
        check: bool = True,
    ) -> None:
        self.calls = calls
        self.own = own
        self.names = names
        self.fixed = tasks
        self.reduce = reduce
        self.check = check
        self.forwards = 0
        self.backwards = 0
        self._states: list[RandomState] = []
        self._has: list[set[int]] = []  # tasks with a loss, per call

    def plain(self, per_task: bool) -> PlainPass:
        """First look: remembers the random state of every call. Per task, or summed (cheaper)."""
        found: dict[int, TaskGradient] = {}
        values: dict[int, Tensor] = {}
        total = [torch.zeros_like(p) for p in [*self.own.shared, *self.own.all_heads]]
        for call in self.calls:
            self._states.append(RandomState.capture(self.own.devices))
            losses = self._losses(call)
            self._has.append({t for t, loss in enumerate(losses) if loss is not None})
            pairs = [(t, loss) for t, loss in enumerate(losses) if loss is not None]
            for t, loss in pairs:
                values[t] = values[t] + loss.detach() if t in values else loss.detach()
            if per_task:
                self._add(found, self._backward(pairs))
            elif pairs:
                self._add_summed(total, [loss for _, loss in pairs])
        tasks = tuple(sorted(values)) if self.fixed is None else tuple(self.fixed)
        if not tasks:
            raise ValueError("no task has a loss in this batch")
        cut = len(self.own.shared)
        if per_task:
            gradients = self._complete(found, tasks)
            stacked = torch.stack([g.loss for g in gradients])
            return PlainPass(tasks, stacked, gradients, self._sum(tasks, gradients))
        stacked = torch.stack([values.get(t, total[0].new_zeros(())) for t in tasks])
        if self.reduce is not None:
            self.reduce([stacked, *total])
        return PlainPass(tasks, stacked, [], (_flat(total[:cut]), total[cut:]))

    def again(self, tasks: Sequence[int]) -> list[TaskGradient]:
        """Losses and gradients of `tasks` at the present weights, with the first pass's draws."""
        found: dict[int, TaskGradient] = {}
        for call, state, has in zip(self.calls, self._states, self._has, strict=True):
            wanted = [t for t in tasks if t in has]
            if not wanted:
                continue
            state.restore()
            losses = self._losses(call)
            pairs = []
            for t in wanted:
                loss = losses[t]
                if loss is None:
                    raise ValueError(
                        f"task {task_name(self.names, t)} had a loss in the first pass and none "
                        "in the second: a closure should see the same batch every time"
                    )
                pairs.append((t, loss))
            self._add(found, self._backward(pairs))
        return self._complete(found, tasks)

    def _losses(self, call: JointClosure) -> list[Loss]:
        losses = list(call())
        if len(losses) != len(self.own.heads):
            raise ConfigError(f"{len(losses)} losses for {len(self.own.heads)} heads")
        self.forwards += any(loss is not None for loss in losses)
        for t, loss in enumerate(losses):
            if loss is None:
                continue
            name = task_name(self.names, t)
            if loss.ndim != 0:
                raise ValueError(f"the loss of task {name} has shape {tuple(loss.shape)}, not ()")
            if not loss.requires_grad:
                raise ConfigError(f"the loss of task {name} depends on no trainable parameter")
            if self.check and not bool(torch.isfinite(loss.detach())):
                raise NonFiniteError(
                    f"the loss of task {name} is {float(loss.detach())}; no gradient was written"
                )
        return losses

    def _backward(self, pairs: Sequence[tuple[int, Tensor]]) -> dict[int, TaskGradient]:
        found = {}
        cut = len(self.own.shared)
        for position, (t, loss) in enumerate(pairs):
            variables = [*self.own.shared, *self.own.heads[t]]
            self.backwards += 1
            keep = position + 1 < len(pairs)
            grads = torch.autograd.grad(loss, variables, retain_graph=keep, allow_unused=True)
            filled = [_or_zero(g, p) for g, p in zip(grads, variables, strict=True)]
            reached = [g is not None for g in grads]
            found[t] = TaskGradient(loss.detach(), _flat(filled[:cut]), filled[cut:], reached)
        return found

    def _add_summed(self, total: list[Tensor], losses: list[Tensor]) -> None:
        self.backwards += 1
        variables = [*self.own.shared, *self.own.all_heads]
        grads = torch.autograd.grad(torch.stack(losses).sum(), variables, allow_unused=True)
        for sum_, gradient in zip(total, grads, strict=True):
            if gradient is not None:
                sum_ += gradient

    def _add(self, found: dict[int, TaskGradient], more: dict[int, TaskGradient]) -> None:
        for t, gradient in more.items():
            if t in found:
                found[t].add(gradient)
            else:
                found[t] = gradient

    def _complete(self, found: dict[int, TaskGradient], tasks: Sequence[int]) -> list[TaskGradient]:
        """One entry per task, zero where only other processes have it, summed over processes."""
        gradients = [found.get(t) or self._nothing(t) for t in tasks]
        if self.reduce is not None:
            sums = [part for g in gradients for part in (g.loss, g.shared, *g.head)]
            reached = torch.tensor([r for g in gradients for r in g.reached]).to(sums[0])
            self.reduce([*sums, reached])
            flags = iter(reached.tolist())
            for gradient in gradients:
                gradient.reached = [next(flags) > 0 for _ in gradient.reached]
        return gradients

    def _nothing(self, task: int) -> TaskGradient:
        head = [torch.zeros_like(p) for p in self.own.heads[task]]
        shared = _flat([torch.zeros_like(p) for p in self.own.shared])
        reached = [False] * (len(self.own.shared) + len(head))
        return TaskGradient(shared.new_zeros(()), shared, head, reached)

    def _sum(
        self, tasks: Sequence[int], gradients: Sequence[TaskGradient]
    ) -> tuple[Tensor, list[Tensor]]:
        shared = torch.stack([g.shared for g in gradients]).sum(0)
        total = {id(p): torch.zeros_like(p) for p in self.own.all_heads}
        for t, gradient in zip(tasks, gradients, strict=True):
            for parameter, part in zip(self.own.heads[t], gradient.head, strict=True):
                total[id(parameter)] += part
        return shared, [total[id(p)] for p in self.own.all_heads]


def as_calls(closures: Closures, tasks: int) -> list[JointClosure]:
    """One closure for all tasks, or one per task, as calls that return a loss per task."""
    if callable(closures):
        return [closures]
    if len(closures) != tasks:
        raise ConfigError(f"{len(closures)} closures for {tasks} heads")
    return [_alone(closure, t, tasks) for t, closure in enumerate(closures)]


def _alone(closure: Callable[[], Loss], task: int, tasks: int) -> JointClosure:
    return lambda: [closure() if t == task else None for t in range(tasks)]


def task_name(names: Sequence[str], task: int) -> str:
    """How messages call a task: its name in quotes, or its number."""
    return f"'{names[task]}'" if task < len(names) else str(task)


def _accumulate(parameter: nn.Parameter, gradient: Tensor) -> None:
    part = gradient.to(parameter.dtype)
    parameter.grad = part.clone() if parameter.grad is None else parameter.grad + part


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    device = tensors[0].device
    return torch.cat([t.reshape(-1).to(device) for t in tensors])


def _or_zero(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if gradient is None else gradient
