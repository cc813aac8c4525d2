"""Many linear layers in one: equal to each task's own layer, at a cost that its rows set."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from polytask.models import TaskLinear
from polytask.models.task_linear import plan_blocks


def layer(outputs: list[int], inputs: int = 6) -> TaskLinear:
    made = TaskLinear(inputs, [f"t{i}" for i in range(len(outputs))], outputs)
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(made.weight, generator=generator)
    torch.nn.init.normal_(made.bias, generator=generator)
    return made


@pytest.mark.parametrize(
    "task",
    [
        [1] * 7,
        [0, 1, 2, 3, 4],
        [3, 0, 0, 4, 0, 0, 0, 1, 0],
        list(np.random.default_rng(0).integers(0, 5, 40)),
        [2],
        [],
    ],
    ids=["one", "each", "uneven", "many", "single", "none"],
)
def test_equals_each_tasks_own_layer(task: list[int]) -> None:
    made = layer([2, 5, 1, 3, 4])
    x = torch.randn(len(task), 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
    found = made(x, np.asarray(task, np.int64))
    expected = [
        made.weight[made.rows(t)] @ row + made.bias[made.rows(t)] for row, t in zip(x, task)
    ]
    for one, own in zip(found, expected, strict=True):
        torch.testing.assert_close(one[: len(own)], own)
    if task:
        total = torch.stack(
            [one[: len(own)].sum() for one, own in zip(found, expected, strict=True)]
        ).sum()
        ours = torch.autograd.grad(total, (x, made.weight, made.bias), retain_graph=True)
        theirs = torch.autograd.grad(
            torch.stack([own.sum() for own in expected]).sum(), (x, made.weight, made.bias)
        )
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


def test_blocks_hold_one_task_each_and_waste_little() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        size, tasks = int(rng.integers(1, 200)), int(rng.integers(1, 60))
        task = rng.choice(tasks, size, p=rng.dirichlet(np.full(tasks, 0.2)))
        plan = plan_blocks(task)
        assert len(set(plan.place.tolist())) == size
        assert np.array_equal(plan.task[plan.place // plan.rows], task)
        present = len(np.unique(task))
        assert len(plan.task) <= 2 * present
        assert len(plan.task) * plan.rows <= 2 * (size + present)
