"""The state of training as named tensors and JSON values, and back.

Everything that a step depends on is here or is a function of the step: weights, optimiser, averaged
weights, random generators. A part that is missing or has another shape is an error, never replaced
by a fresh one.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polytask.errors import CheckpointError, suggestion
from polytask.train.optim import full


def copy_into(target: Tensor, source: Tensor) -> None:
    """Copy a whole tensor into a tensor that may be a shard."""
    if hasattr(target, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        shard: Any = target
        source = distribute_tensor(source.to(shard.device), shard.device_mesh, shard.placements)
    with torch.no_grad():
        target.copy_(source)


def pack_model(model: nn.Module) -> dict[str, Tensor]:
    return {name: full(tensor.detach()) for name, tensor in model.state_dict().items()}


def unpack_model(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy weights and buffers in place; names and shapes have to be exactly the model's."""
    _copy_named(model.state_dict(), tensors, where)


def _copy_named(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str) -> None:
    missing = [name for name in targets if name not in tensors]
    extra = [name for name in tensors if name not in targets]
    if missing or extra:
        parts = []
        if missing:
            parts.append(f"'{missing[0]}' is missing ({len(missing)} in all)")
        if extra:
            hint = suggestion(extra[0], targets)
            parts.append(f"'{extra[0]}' is not the model's ({len(extra)} in all).{hint}")
        raise CheckpointError(f"{where} does not fit the model: " + "; ".join(parts))
    for name, target in targets.items():
        if target.shape != tensors[name].shape or target.dtype != tensors[name].dtype:
            raise CheckpointError(
                f"{where} does not fit the model: '{name}' is {_kind(tensors[name])}, "
                f"expected {_kind(target)}"
            )
        copy_into(target, tensors[name])


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def pack_optimizer(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Tensor]:
    """State tensors as 'parameter/key'. `names` maps id(parameter) to its name."""
    return {
        f"{names[id(parameter)]}/{key}": full(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def unpack_optimizer(
    optimizer: torch.optim.Optimizer,
    names: Mapping[int, str],
    tensors: Mapping[str, Tensor],
    where: str,
) -> None:
    """Restore what `pack_optimizer` gave; a parameter has all of its state or (unused) none."""
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, part = key.rsplit("/", 1)
        by_parameter.setdefault(name, {})[part] = value
    optimizer.state.clear()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            found = by_parameter.pop(names[id(parameter)], None)
            if found is not None:
                optimizer.state[parameter] = {
                    part: _like(parameter, value) for part, value in found.items()
                }
    if by_parameter:
        raise CheckpointError(
            f"{where} has optimiser state of '{next(iter(by_parameter))}', which does not train"
        )


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """A state tensor on the parameter's device, sharded as it is when it has its shape."""
    value = value.to(parameter.device)
    if value.shape == parameter.shape and value.ndim:
        result = torch.empty_like(parameter, dtype=value.dtype)
        copy_into(result, value)
        return result
    return value.clone()  # not a view that keeps a whole file in memory


def pack_random(device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The states of the torch, numpy and Python generators."""
    tensors = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002
    tensors["numpy"] = torch.from_numpy(np.asarray(keys).astype(np.int64))
    version, words, gauss_next = random.getstate()
    tensors["python"] = torch.tensor(words, dtype=torch.int64)
    plain = {
        "numpy": [str(kind), int(position), int(has_gauss), float(gauss)],
        "python": [version, gauss_next],
    }
    return tensors, plain


def unpack_random(
    device: torch.device, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]
) -> None:
    torch.set_rng_state(tensors["torch"])
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)
    kind, position, has_gauss, gauss = plain["numpy"]
    keys = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state((kind, keys, position, has_gauss, gauss))  # noqa: NPY002
    version, gauss_next = plain["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss_next))


def seed_step(seed: int, device: torch.device) -> None:
    """Seed torch for one step: its random numbers are then a function of the step alone."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
