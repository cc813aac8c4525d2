"""How much each task's loss counts: three rules behind one small interface.

A `Weighting` gives a factor per task (`weights`), an optional term of its own (`penalty`), and may
learn from the mean losses it is shown (`observe`). Its parameters and buffers are its state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from polytask.errors import ConfigError, suggestion
from polytask.registry import Registry
from polytask.train.config import TrainConfig

weightings: Registry[type[Weighting]] = Registry("weighting")


class Weighting(nn.Module):
    """Every task counts as the user says (`task_weights`), once per pair if they say nothing."""

    def __init__(self, tasks: int, config: TrainConfig, given: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("given", given, persistent=False)

    given: Tensor | None

    def weights(self) -> Tensor | None:
        """Factor per task (tasks,); None: 1 for all, which costs nothing."""
        return self.given

    def penalty(self) -> Tensor | None:
        """A loss of the weights' own per pair of each task (tasks,), or None."""
        return None

    def observe(self, total: Tensor, count: Tensor) -> None:
        """Summed loss and number of pairs per task (tasks,) of one step."""


weightings.add("equal", Weighting)


@weightings.register("uncertainty")
class Uncertainty(Weighting):
    """Learned log-variances s: the loss of a pair of task t is exp(-s_t) l + s_t / 2.

    Kendall, Gal and Cipolla, Multi-Task Learning Using Uncertainty to Weigh Losses, CVPR 2018,
    with their s = log sigma^2 and exp(-s) in place of exp(-s) / 2, so that it starts as `equal`
    and settles where s_t = log(2 l_t).
    """

    def __init__(self, tasks: int, config: TrainConfig, given: Tensor | None) -> None:
        super().__init__(tasks, config, given)
        self.log_variance = nn.Parameter(torch.zeros(tasks))

    def weights(self) -> Tensor:
        factor = torch.exp(-self.log_variance)
        return factor if self.given is None else factor * self.given

    def penalty(self) -> Tensor:
        return self.log_variance / 2


@weightings.register("dynamic")
class DynamicAverage(Weighting):
    """Tasks whose loss falls slowly count more: w_t = T softmax(r_t / temperature), where r_t is
    the task's mean loss over the last round divided by that over the round before.

    Liu, Johns and Davison, End-to-End Multi-Task Learning with Attention, CVPR 2019 (DWA). A round
    has `weighting_every` steps; a task unseen in one of the two rounds has r_t = 1.
    """

    def __init__(self, tasks: int, config: TrainConfig, given: Tensor | None) -> None:
        super().__init__(tasks, config, given)
        self.every = config.weighting_every
        self.temperature = config.temperature
        for name in ("total", "count"):  # this round's, and the last two rounds' means
            self.register_buffer(name, torch.zeros(tasks))
        self.register_buffer("rounds", torch.full((2, tasks), float("nan")))
        self.register_buffer("current", torch.ones(tasks))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self._steps = 0

    total: Tensor
    count: Tensor
    rounds: Tensor
    current: Tensor
    seen: Tensor

    def weights(self) -> Tensor:
        return self.current if self.given is None else self.current * self.given

    @torch.no_grad()
    def observe(self, total: Tensor, count: Tensor) -> None:
        self.total += total
        self.count += count
        self.seen += 1
        self._steps += 1
        if self._steps % self.every:
            return
        mean = torch.where(self.count > 0, self.total / self.count.clamp(min=1), torch.nan)
        self.rounds.copy_(torch.stack([self.rounds[1], mean]))
        ratio = torch.nan_to_num(self.rounds[1] / self.rounds[0], nan=1.0, posinf=1.0)
        self.current.copy_(len(ratio) * torch.softmax(ratio / self.temperature, 0))
        self.total.zero_()
        self.count.zero_()

    def load_state_dict(self, *args: object, **kwargs: object) -> object:  # type: ignore[override]
        result = super().load_state_dict(*args, **kwargs)  # type: ignore[arg-type]
        self._steps = int(self.seen.item())
        return result


def build_weighting(config: TrainConfig, tasks: Sequence[str]) -> Weighting:
    """The configured weighting; `ConfigError` for a task weight of an unknown task."""
    given = given_weights(config.task_weights, tasks)
    return weightings.get(config.weighting)(len(tasks), config, given)


def given_weights(table: Mapping[str, float], tasks: Sequence[str]) -> Tensor | None:
    """The user's factor per task (tasks,), or None when all are 1."""
    for name in table:
        if name not in tasks:
            raise ConfigError(f"task_weights: unknown task '{name}'.{suggestion(name, tasks)}")
    if not table:
        return None
    return torch.tensor([table.get(name, 1.0) for name in tasks])
