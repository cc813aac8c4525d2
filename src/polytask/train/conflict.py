"""Do tasks pull the same way? Pairwise cosines of their gradients, per group of layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def layer_group(name: str) -> str:
    """The group a parameter belongs to: its module path up to the first number, or its first part.

    >>> layer_group("trunk.layers.3.attention.query.weight")
    'trunk.layers.3'
    >>> layer_group("stems.text.embedding.weight")
    'stems.text'
    """
    parts = name.split(".")[:-1]
    for index, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: index + 1])
    return ".".join(parts[:2]) or name


@torch.no_grad()
def cosines(gradients: Tensor) -> Tensor:
    """(tasks, params) -> (tasks, tasks) cosines; NaN in the row and column of a zero gradient."""
    norms = gradients.norm(dim=1)
    return (gradients @ gradients.T) / torch.outer(norms, norms)


@torch.no_grad()
def layer_cosines(
    names: Sequence[str], jacobians: Sequence[Tensor], tasks: Sequence[int]
) -> dict[str, Any]:
    """{"tasks": ids, "cosine": {group: (tasks, tasks) lists, "all": ...}}; None stands for NaN."""
    groups: dict[str, list[Tensor]] = {}
    for name, jacobian in zip(names, jacobians):
        groups.setdefault(layer_group(name), []).append(jacobian.flatten(1).float())
    gramians = {
        group: torch.stack([j @ j.T for j in members]).sum(0) for group, members in groups.items()
    }
    gramians["all"] = torch.stack(list(gramians.values())).sum(0)
    return {"tasks": list(tasks), "cosine": {g: _normalise(m) for g, m in gramians.items()}}


def _normalise(gramian: Tensor) -> list[list[float | None]]:
    size = gramian.diagonal().sqrt()
    table = (gramian / torch.outer(size, size)).clamp(-1, 1).tolist()
    return [[None if value != value else round(value, 4) for value in row] for row in table]
