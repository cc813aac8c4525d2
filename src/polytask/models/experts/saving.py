"""Models with experts on disk: a whole one, and one task's with only the experts it uses.

folder/config.json          the `MoEViTConfig`
folder/model.safetensors    the weights
folder/manifest.json        sizes and checksums, written last
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from polytask import files
from polytask.configs import parse
from polytask.errors import CheckpointError, ConfigError
from polytask.models.experts.config import ExpertsConfig
from polytask.models.experts.routers import task_ranges
from polytask.models.experts.vit import MoEViT, MoEViTConfig

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save_vit(model: MoEViT, folder: Path) -> Path:
    """Write a model; the folder is whole or not there."""
    from safetensors.torch import save_file

    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    with files.building(folder) as aside:
        (aside / CONFIG).write_text(model.config.model_dump_json(indent=2), encoding="utf-8")
        save_file(state, aside / WEIGHTS, {"format": "pt"})
    return folder


def load_vit(folder: Path) -> MoEViT:
    """Read what `save_vit` or `export_task` wrote; `CheckpointError` when it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = read_config(folder)
    files.verify_manifest(folder)
    model = MoEViT(config)
    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{folder / WEIGHTS} does not fit {CONFIG}: {error}") from error
    return model.eval()


def read_config(folder: Path) -> MoEViTConfig:
    """The configuration of a saved model."""
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no saved model: it has no {CONFIG}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return parse(MoEViTConfig, data, str(path))


@torch.no_grad()
def single_task(model: MoEViT, task: str, used: Sequence[Sequence[int]] | None = None) -> MoEViT:
    """A model of one task: its gate, its head, the dense blocks, and the experts `used`.

    A token whose K experts are all here gets exactly the whole model's output: gates still give
    probabilities over all N experts. A token that would choose a missing expert takes the next one
    that is here.

    Args:
        model: the multitask model.
        task: its name.
        used: per layer with experts, those to keep, from `ExpertUsage.used(task)` on data like
            that of the requests; None keeps those the task may use (all, unless `per_task`).

    Raises:
        ConfigError: an unknown task, or fewer than k experts in a layer.
    """
    number, config = model.task_id(task), model.config
    experts = config.experts
    if experts is not None:
        if used is None:
            used = [_permitted(moe.router._allowed(torch.tensor([number])), moe.experts.ids)
                    for moe in model.sparse_layers.values()]  # fmt: skip
        for layer, ids in zip(config.sparse, used, strict=True):
            if len(ids) < experts.k:
                raise ConfigError(
                    f"task '{task}' uses {len(ids)} experts of block {layer}, and every token "
                    f"needs k = {experts.k}; measure its use on more data"
                )
        kept = tuple(tuple(sorted(int(i) for i in ids)) for ids in used)
        span = None
        if experts.per_task is not None and experts.router != "blind":
            row = task_ranges(experts.count, experts.per_task, len(config.tasks))[number]
            first = int(row.nonzero()[0])
            span = (first, first + experts.per_task)
        experts = ExpertsConfig(**(experts.model_dump() | {"kept": kept, "span": span}))
    slim = config.model_copy(update={"tasks": (config.tasks[number],), "experts": experts})
    found = MoEViT(slim)
    source, target = model.state_dict(), found.state_dict()
    several = config.experts is not None and config.experts.router == "multi_gate"
    found.load_state_dict({name: _taken(name, source, number, several) for name in target})
    return found.train(model.training)


def _permitted(allowed: Tensor | None, ids: Sequence[int]) -> list[int]:
    return [i for i in ids if allowed is None or bool(allowed[0, i])]


def _taken(name: str, source: dict[str, Tensor], number: int, several: bool) -> Tensor:
    """A single-task model's tensor, from the multitask model's."""
    if name.startswith("heads.0."):
        return source[f"heads.{number}.{name.removeprefix('heads.0.')}"]
    if several and name.endswith(".router.gates.0"):
        return source[name.removesuffix("0") + str(number)]
    if name == "task_embedding.first.weight":
        return source[name][:, number : number + 1]
    return source[name]


def export_task(
    model: MoEViT, folder: Path, task: str, used: Sequence[Sequence[int]] | None = None
) -> Path:
    """Write `single_task(model, task, used)`."""
    return save_vit(single_task(model, task, used), folder)
