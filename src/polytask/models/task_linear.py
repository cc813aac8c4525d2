"""Linear layers of many tasks in one weight, applied to rows that each belong to one task.

The cost of a step depends on the rows and on the widest output among the tasks that occur, never
on how many tasks exist: rows are sorted into blocks of one task each, and one batched product runs
over blocks. With one task in the batch it is a plain linear layer on a slice.

Legend: N rows, D inputs, G tasks that occur, B rows per block, C widest output among those tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

HostArray = npt.NDArray[Any]


@dataclass(frozen=True)
class Blocks:
    """How N rows are laid out in blocks of B rows of one task."""

    task: HostArray  # (blocks,) index of the block's task
    place: HostArray  # (N,) each row's place among blocks * B
    rows: int  # B


def plan_blocks(task: HostArray) -> Blocks:
    """Blocks of ceil(N / G) rows: at most 2 G of them, so padding at most doubles the rows (plus
    G), however unevenly the tasks occur."""
    present, inverse, count = np.unique(task, return_inverse=True, return_counts=True)
    rows = max(1, -(-len(task) // max(1, len(present))))
    blocks = -(-count // rows)
    order = np.argsort(inverse, kind="stable")
    first = np.cumsum(count) - count
    rank = np.arange(len(task)) - first[inverse[order]]
    place = np.empty(len(task), np.int64)
    place[order] = (np.cumsum(blocks) - blocks)[inverse[order]] * rows + rank
    return Blocks(np.repeat(present, blocks), place, rows)


class TaskLinear(nn.Module):
    """y = W[task] x + b[task]; `outputs[i]` numbers for task i, at rows offset[i] of one weight."""

    def __init__(self, inputs: int, names: Sequence[str], outputs: Sequence[int]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.outputs = np.asarray(outputs, np.int64)
        self.offset = np.cumsum(self.outputs) - self.outputs
        total = int(self.outputs.sum())
        self.weight = nn.Parameter(torch.zeros(total, inputs))
        self.bias = nn.Parameter(torch.zeros(total))

    def rows(self, index: int) -> slice:
        """The rows of weight and bias that belong to a task."""
        start = int(self.offset[index])
        return slice(start, start + int(self.outputs[index]))

    def forward(self, x_ND: Tensor, task: HostArray) -> Tensor:
        """(N, C); beyond a task's own outputs the columns hold numbers without meaning."""
        if len(task) == 0:
            return x_ND.new_zeros(0, 1)
        if (task == task[0]).all():
            own = self.rows(int(task[0]))
            return nn.functional.linear(x_ND, self.weight[own], self.bias[own])
        plan = plan_blocks(task)
        outputs = self.outputs[plan.task]
        widest = int(outputs.max())
        column = np.minimum(np.arange(widest), outputs[:, None] - 1)
        index = torch.from_numpy(self.offset[plan.task][:, None] + column).to(x_ND.device)
        place = torch.from_numpy(plan.place).to(x_ND.device)
        blocks = len(plan.task)
        room = x_ND.new_zeros(blocks * plan.rows, x_ND.shape[1])
        room = room.index_copy(0, place, x_ND).view(blocks, plan.rows, -1)
        weight = self.weight[index]  # (blocks, C, D)
        out = torch.bmm(room, weight.transpose(1, 2)) + self.bias[index][:, None]
        return out.flatten(0, 1).index_select(0, place)

    def width(self, task: HostArray) -> HostArray:
        """(N,) how many columns of `forward` have meaning."""
        found: HostArray = self.outputs[task]
        return found
