"""Small fakes: a trunk with a head per task, and batches that are a function of their index."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from polytask import rng
from polytask.models.batch import Batch, Target, Terms
from polytask.train.loader import FunctionLoader

TASKS = ("alpha", "beta", "gamma")
WIDTH = 6


class TinyModel(nn.Module):
    """Linear trunk with a norm, one linear head per task; squared error."""

    def __init__(self, tasks: int = 3, dropout: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.trunk = nn.Sequential(
            nn.Linear(WIDTH, 8), nn.LayerNorm(8), nn.Dropout(dropout), nn.Tanh()
        )
        self.heads = nn.ModuleList(nn.Linear(8, 1) for _ in range(tasks))

    def shared_names(self) -> list[str]:
        return [name for name, _ in self.named_parameters() if name.startswith("trunk")]

    def predict(self, x: Tensor, task: Tensor) -> Tensor:
        hidden = self.trunk(x)
        outputs = torch.cat([head(hidden) for head in self.heads], 1)
        return outputs.gather(1, task[:, None])[:, 0]

    def terms(self, batch: Batch) -> Terms:
        target = batch.targets["regress"]
        error = self.predict(batch.fields["features.values"], target.task) - target.value
        return Terms({"mse": error**2}, {"mse": target.task}, {"mse": target.row})

    forward = terms


def make_batch(x: Tensor, y: Tensor, task: Tensor, row: Tensor) -> Batch:
    n = len(x)
    target = Target(torch.arange(n)[:, None], task, row, y)
    return Batch(
        fields={"features.values": x, "features.length": torch.full((n,), 2)},
        targets={"regress": target},
        task=task,
        row=row,
        rows=n,
    )


def rows_of(first: int, count: int, tasks: int = 3) -> Batch:
    """Rows `first` to `first + count`: each row is a function of its number."""
    xs, ys, ts = [], [], []
    for row in range(first, first + count):
        g = rng.torch_generator(7, "row", row)
        x = torch.randn(WIDTH, generator=g)
        task = int(torch.randint(tasks, (), generator=g))
        xs.append(x)
        ys.append((x[task] - x[(task + 1) % WIDTH]) * (task + 1))
        ts.append(task)
    return make_batch(
        torch.stack(xs), torch.stack(ys), torch.tensor(ts), torch.arange(first, first + count)
    )


def loader_of(
    batch_size: int, tasks: Sequence[str] = TASKS, rank: int = 0, world: int = 1
) -> FunctionLoader:
    """Micro-batches of consecutive rows; processes take consecutive parts."""
    a, b = batch_size * rank // world, batch_size * (rank + 1) // world

    def function(index: int) -> Batch:
        return rows_of(index * batch_size + a, b - a, len(tasks))

    return FunctionLoader(tasks, function, rows_per_epoch=64)
