"""Initial parameters as a function of (seed, parameter name) alone.

A parameter's start does not depend on what else the model has: the trunk of a single-task model
equals the trunk of the multitask model it is compared with, and adding a task moves nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from polytask.models.experts.routers import TaskRouter
from polytask.models.task_linear import TaskLinear
from polytask.models.transformer import Block, Transformer
from polytask.rng import torch_generator

_SMALL = 0.02
# Parts of a block that write to the residual stream; an expert's 'down' does so as well.
_WRITERS = ("attention.out", "cross.out", ".down")


@torch.no_grad()
def initialise(model: nn.Module, seed: int, skip: Iterable[str] = ()) -> None:
    """Fill every parameter whose name does not start with one of `skip`.

    Linear weights have deviation 1 / sqrt(inputs), those that write to the residual stream that
    over sqrt(2 layers); embeddings and heads 0.02; biases 0. What a module sets itself (norms,
    temperatures) is left. `module.init_std` = {parameter: deviation} overrides, and a router fills
    its gates itself.
    """
    skipped = tuple(skip)
    depth = _depth_scales(model)
    for prefix, module in model.named_modules():
        if isinstance(module, TaskRouter) and not (skipped and prefix.startswith(skipped)):
            module.fill(seed, prefix)
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{prefix}.{name}" if prefix else name
            if skipped and full.startswith(skipped):
                continue
            if isinstance(module, TaskLinear):
                _fill_task_rows(module, name, parameter, seed, prefix)
                continue
            std = _deviation(module, name)
            if std is not None:
                std *= depth.get(full, 1.0)
                parameter.normal_(0.0, std, generator=torch_generator(seed, "init", full))
            elif name == "bias" and isinstance(module, nn.Linear):
                parameter.zero_()


def _deviation(module: nn.Module, name: str) -> float | None:
    chosen = getattr(module, "init_std", {})
    if name in chosen:
        return float(chosen[name])
    if isinstance(module, nn.Linear) and name == "weight":
        return 1 / math.sqrt(module.in_features)
    return _SMALL if isinstance(module, nn.Embedding) else None


def _depth_scales(model: nn.Module) -> dict[str, float]:
    """Names of the weights that write to a residual stream, with 1 / sqrt(2 layers)."""
    scales: dict[str, float] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, Transformer):
            scale = 1 / math.sqrt(2 * max(1, len(module.blocks)))
            for name, block in module.named_modules():
                if isinstance(block, Block):
                    base = f"{prefix}.{name}." if prefix else f"{name}."
                    ends = [part for part, _ in block.named_modules() if part.endswith(_WRITERS)]
                    scales |= {f"{base}{end}.weight": scale for end in ends}
    return scales


def _fill_task_rows(
    module: TaskLinear, name: str, parameter: Tensor, seed: int, prefix: str
) -> None:
    if name == "bias":
        parameter.zero_()
        return
    for index, task in enumerate(module.names):
        generator = torch_generator(seed, "init", prefix, task)
        parameter[module.rows(index)].normal_(0.0, _SMALL, generator=generator)
