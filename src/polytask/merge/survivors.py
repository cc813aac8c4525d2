"""Which parameters PCB-Merging keeps of each task, and how far tasks keep the same ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from polytask.errors import MergeError
from polytask.merge.method import Method, TensorInfo
from polytask.merge.methods.pcb import PCB
from polytask.merge.vectors import TaskVectors


def survivors(method: Method, vectors: TaskVectors) -> tuple[dict[str, Tensor], Tensor]:
    """Shares above 0 in a merge of `vectors`.

    Returns:
        kept: tensor name -> (K,) fraction of its parameters that task k keeps.
        overlap: (K, K), parameters that both keep / that at least one keeps; 0 where neither does.

    Raises:
        MergeError: another method than PCB-Merging over the whole model.
    """
    if not isinstance(method, PCB) or method.scope != "model":
        raise MergeError(
            f"survivors are those of PCB-Merging over whole models, not {method.title}"
        )
    state: Mapping[str, Any] = {}
    for number in range(len(method.passes)):
        total: Any = None
        for key, delta in vectors.deltas.items():
            zero = torch.zeros_like(delta[0])
            where = TensorInfo(key, vectors.names)
            part = method.measure(number, delta.clone(), zero, where, state)
            total = part if total is None else method.combine(number, total, part)
        state = method.finish(number, total, state, vectors.names)
    count = len(vectors)
    both, kept = torch.zeros(count, count, dtype=torch.float64), {}
    for key, delta in vectors.deltas.items():
        _, shares = method.shares(delta.reshape(count, -1).clone(), state)
        alive = (shares > 0).double()
        kept[key] = alive.mean(1)
        both += alive @ alive.T
    size = both.diagonal()
    either = size[:, None] + size[None] - both
    return kept, both / either.clamp(min=1)
