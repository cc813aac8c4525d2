"""The optimiser: AdamW with parameter groups, learning rates as a pure function of the step, one
device-side pass for clipping and the finite check, and averaged weights.

Because the schedule is a function of the step, it has no state to save or to lose.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from polytask.train.config import StageConfig, TrainConfig
from polytask.train.stages import Leg, first_match, matching


def build_optimizer(
    model: nn.Module, stage: StageConfig, config: TrainConfig, extra: nn.Module | None = None
) -> torch.optim.AdamW:
    """AdamW over what trains; norms, biases and `no_decay` patterns get no weight decay.

    Each group carries `peak` (its learning rate before the schedule). `extra` holds learned loss
    weights; they are trained without decay.
    """
    names = [name for name, _ in model.named_parameters()]
    matching(names, tuple(config.lrs), "lrs")
    matching(names, config.no_decay, "no_decay")
    norms = _norm_parameters(model)
    base = stage.lr or config.lr
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = (
            parameter.ndim < 2
            or name in norms
            or name.endswith("bias")
            or any(fnmatchcase(name, pattern) for pattern in config.no_decay)
        )
        key = (first_match(name, config.lrs) or base, 0.0 if plain else config.weight_decay)
        groups.setdefault(key, []).append(parameter)
    if extra is not None and (weights := list(extra.parameters())):
        groups.setdefault((base, 0.0), []).extend(weights)
    described: list[dict[str, Any]] = [
        {"params": parameters, "lr": lr, "peak": lr, "weight_decay": decay}
        for (lr, decay), parameters in groups.items()
    ]
    return torch.optim.AdamW(described, betas=config.betas, eps=config.eps, fused=True)


def _norm_parameters(model: nn.Module) -> set[str]:
    """Names of parameters that belong to normalisation layers, whoever wrote them."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for name, _ in module.named_parameters(recurse=False)
    }


def scale_at(step: int, leg: Leg, config: TrainConfig) -> float:
    """The learning rate at `step` as a share of its peak.

    Warm-up rises linearly to 1. After it, with t from 0 to 1: constant 1; linear 1 - t; cosine
    (1 + cos(pi t)) / 2; wsd: 1, then linear over the last `decay` of the stage. All but
    'constant' end at `floor`.

    >>> from polytask.train.stages import legs
    >>> leg = legs([StageConfig(steps=10, warmup=2, schedule="linear")])[0]
    >>> [round(scale_at(s, leg, TrainConfig(steps=10)), 3) for s in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.125]
    """
    total, done = leg.stop - leg.start, step - leg.start
    warmup = config.warmup if leg.config.warmup is None else leg.config.warmup
    rise = int(warmup if warmup >= 1 else warmup * total)
    if done < rise:
        return (done + 1) / rise
    kind = leg.config.schedule or config.schedule
    t = (done - rise) / max(1, total - rise)
    if kind == "constant":
        return 1.0
    if kind == "linear":
        share = 1 - t
    elif kind == "cosine":
        share = (1 + math.cos(math.pi * t)) / 2
    else:
        fall = config.decay * total
        share = min(1.0, (total - done) / fall)
    return config.floor + (1 - config.floor) * share


def set_scale(optimizer: torch.optim.Optimizer, scale: float) -> float:
    """Set every group's learning rate to `scale` times its peak; returns the first."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * scale
    return float(optimizer.param_groups[0]["lr"])


@torch.no_grad()
def clip_(gradients: list[Tensor], divisor: Tensor, clip: float) -> Tensor:
    """Divide gradients by `divisor` and clip their norm, in place; returns the norm before it.

    Everything stays on the device: the norm is a tensor that nobody reads here. A non-finite
    gradient gives a non-finite norm.
    """
    if not gradients:
        return torch.zeros((), device=divisor.device)
    norm = full(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))) / divisor
    scale = 1 / divisor
    if clip:
        scale = scale * (clip / (norm + 1e-6)).clamp(max=1.0)
    if hasattr(gradients[0], "full_tensor"):
        torch._foreach_mul_(gradients, float(scale))  # shards take numbers only
    else:
        torch._foreach_mul_(gradients, scale)
    return norm


def full(tensor: Tensor) -> Tensor:
    """The whole tensor where FSDP2 shards it (every process has to ask); else itself."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def id_of(tensor: Tensor) -> int:
    """The same number for tensors that share their memory (tied weights)."""
    local: Tensor = getattr(tensor, "_local_tensor", tensor)
    return int(local.untyped_storage()._cdata)


class AveragedWeights:
    """Exponential moving average of the floating-point weights: a <- d a + (1 - d) w.

    The decay at step s is min(d, (1 + s) / (10 + s)), so that early averages are not dominated by
    the random start.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        # The tensors themselves are held, not their memory: DDP gives parameters new memory.
        self._live: dict[str, Tensor] = {}
        kept = model.state_dict().keys()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name in kept and tensor.is_floating_point():  # tied weights come once
                self._live[name] = tensor
        self.average = {name: tensor.detach().clone() for name, tensor in self._live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.average.values()), list(self._live.values()), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the model has the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def settle(self) -> None:
        """Leave the model with the averaged weights."""
        for name, live in self._live.items():
            live.copy_(self.average[name])

    @torch.no_grad()
    def _swap(self) -> None:
        for name, live in self._live.items():
            kept = live.clone()
            live.copy_(self.average[name])
            self.average[name].copy_(kept)
