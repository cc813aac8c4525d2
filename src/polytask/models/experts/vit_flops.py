"""What one request to a `MoEViT` costs: operations, and bytes of weights it has to touch.

Counts are of matrix products and convolutions, 2 per multiply-add, as torch's counter has them.
Everything follows from shapes, except how many pairs a capacity or a gate threshold leaves out:
then the count is an upper bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from polytask.models.experts.vit import MoEViT, MoEViTConfig, VisionTask


@dataclass(frozen=True)
class RequestCost:
    """Operations and bytes of one image's pass for one task, by part."""

    flops: dict[str, int]
    bytes: dict[str, int]

    @property
    def total_flops(self) -> int:
        return sum(self.flops.values())

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes.values())


def vit_flops(config: MoEViTConfig, task: str) -> dict[str, int]:
    """Operations of one image's forward pass for a task, by part."""
    tokens, dim, grid = config.tokens, config.dim, config.grid
    found = {
        "patches": 2 * grid**2 * config.channels * config.patch**2 * dim,
        "attention": config.depth * (2 * tokens * dim * 4 * dim + 4 * tokens**2 * dim),
        "dense": (config.depth - len(config.sparse)) * 4 * tokens * dim * config.hidden,
    }
    experts = config.experts
    if experts is not None:
        hidden, layers = experts.width(dim), len(config.sparse)
        matrices = 3 if experts.gated else 2
        found["experts"] = layers * 2 * tokens * experts.k * dim * hidden * matrices
        found["gates"] = layers * 2 * tokens * dim * experts.count
        if experts.router == "conditioned":  # the embeddings of all tasks, once per pass
            count, wide = len(config.tasks), experts.task_dim
            found["gates"] += 2 * count * wide * wide + layers * 2 * count * wide * experts.count
    found["head"] = _head_flops(next(t for t in config.tasks if t.name == task), config)
    return found


def _head_flops(task: VisionTask, config: MoEViTConfig) -> int:
    dim, side = config.dim, config.grid
    if task.head == "image":
        return 2 * dim * task.outputs
    if task.head == "patch":
        return 2 * side**2 * dim * task.outputs * task.upscale**2
    width = min(256, dim)
    total, inside = 0, dim
    for _ in range(task.stages):
        total += 2 * side**2 * 9 * inside * width
        inside, side = width, 2 * side
    return total + 2 * side**2 * width * task.outputs


def request_cost(
    model: MoEViT, task: str, used: Sequence[Sequence[int]] | None = None
) -> RequestCost:
    """Operations of one image, and the bytes of the weights that a task's requests touch.

    Args:
        model: with or without experts.
        task: a name.
        used: per layer with experts, those that the task's tokens go to (see
            `ExpertUsage.used`); None: all that are here.
    """
    config, number = model.config, model.task_id(task)
    parts = {"dense": 0, "experts": 0, "gates": 0, "head": _bytes(model.heads[number])}
    for name, parameter in model.named_parameters():
        if not (name.startswith("heads.") or ".experts." in name or ".router." in name):
            parts["dense"] += parameter.nbytes
    for layer, moe in enumerate(model.sparse_layers.values()):
        chosen = moe.experts.ids if used is None else used[layer]
        parts["experts"] += sum(_bytes(moe.experts[str(e)]) for e in chosen)
        gates = moe.router.gates
        parts["gates"] += gates[number if len(gates) > 1 else 0].nbytes
    return RequestCost(vit_flops(config, task), parts)


def _bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())
