"""Look into adapters: what each task takes of each module, which tasks are alike, and whether
their gradients agree.

`gradient_alignment` is the measure of Caccia et al. 2023 (arXiv 2211.03831, section 5): cosines
between the gradients of different tasks with respect to the shared modules. Any multi-objective
training can use it.

Legend: T tasks, H blocks, S modules, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from polytask.adapt.adapters import Adapters
from polytask.adapt.bottleneck import ScaledSum
from polytask.adapt.routing import TaskTable
from polytask.adapt.sites import name_of
from polytask.errors import AdaptError
from polytask.train.conflict import cosines

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Alignment:
    """Cosines between the gradients of tasks: (T, T), NaN for a task without gradient."""

    tasks: tuple[str, ...]
    cosine: Floats

    @property
    def mean(self) -> float:
        """Over pairs of different tasks; NaN when there is none."""
        if len(self.tasks) < 2:
            return float("nan")
        pairs = self.cosine[np.triu_indices(len(self.tasks), 1)]
        known = pairs[~np.isnan(pairs)]
        return float(known.mean()) if len(known) else float("nan")


def gradient_alignment(
    loss: Callable[[str], Tensor], tasks: Sequence[str], parameters: Sequence[nn.Parameter]
) -> Alignment:
    """Differentiate every task's loss with respect to the same parameters and compare.

    Args:
        loss: task name -> scalar loss, computed afresh at the present weights.
        tasks: names.
        parameters: what they share.

    Raises:
        AdaptError: nothing is shared, or no parameter trains.
    """
    shared = [p for p in parameters if p.requires_grad]
    if not shared:
        raise AdaptError("gradient alignment needs parameters that train and that tasks share")
    rows = []
    for task in tasks:
        found = torch.autograd.grad(loss(task), shared, allow_unused=True)
        parts = [torch.zeros_like(p) if g is None else g for p, g in zip(shared, found)]
        rows.append(torch.cat([g.detach().flatten().float() for g in parts]))
    return Alignment(tuple(tasks), cosines(torch.stack(rows)).double().cpu().numpy())


def shared_parameters(adapters: Adapters) -> list[nn.Parameter]:
    """What tasks share in routed adapters: the modules, not the routing rows."""
    return [p for layer in adapters.routed().values() for p in (layer.lora_A, layer.lora_B)]


@dataclass(frozen=True)
class Routing:
    """What every task takes: `weight[group]` (T, H, S) by routing table, in the model's order."""

    tasks: tuple[str, ...]
    weight: Mapping[str, Floats]

    def flat(self) -> Floats:
        """(T, all weights): one row a task."""
        return np.concatenate([w.reshape(len(self.tasks), -1) for w in self.weight.values()], 1)

    def distance(self) -> Floats:
        """(T, T): root mean square difference of two tasks' weights."""
        flat = self.flat()
        gap = flat[:, None] - flat[None]
        found: Floats = np.sqrt((gap**2).mean(-1))
        return found

    def linkage(self) -> Floats:
        """(T - 1, 4) average-linkage tree of the tasks, as `scipy.cluster.hierarchy` has it."""
        from scipy.cluster.hierarchy import linkage
        from scipy.spatial.distance import squareform

        if len(self.tasks) < 2:
            raise AdaptError("a tree of tasks needs two tasks")
        found: Floats = linkage(squareform(self.distance(), checks=False), "average")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        weight = {name: np.round(w, 5).tolist() for name, w in self.weight.items()}
        return {"tasks": list(self.tasks), "weight": weight}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Routing:
        """Back from `to_dict`."""
        weight = {name: np.asarray(w, float) for name, w in record["weight"].items()}
        return cls(tuple(record["tasks"]), weight)


def routing_of(adapters: Adapters) -> Routing:
    """The routing weights (routed adapters) or scales (ScaLearn: mean over features, (T, 1, S)).

    Raises `AdaptError` for adapters without either.
    """
    weight: dict[str, Floats] = {}
    for key, table in adapters.tables.items():
        if isinstance(table, TaskTable):
            found = table.table()
        elif isinstance(table, ScaledSum):
            found = table.omega.detach().mean(2)[:, None]
        else:
            continue
        weight[name_of(key)] = found.double().cpu().numpy()
    if not weight:
        raise AdaptError(f"'{adapters.config.method}' adapters have no routing to look at")
    return Routing(adapters.tasks, weight)
