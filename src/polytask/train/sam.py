"""Sharpness-aware parts: move the weights uphill, look again, and put them back bit for bit.

Sharpness-aware minimisation (Foret et al. 2021, arXiv 2010.01412) evaluates the gradient where the
loss is worst within a radius rho. Three things go wrong in practice and are settled here once:
weights restored by subtracting the perturbation drift (`perturbed` keeps a copy), dropout drawn
anew turns the difference of two gradients into noise (`RandomState` replays it), and normalisation
statistics are updated once per pass instead of once per batch (`frozen_statistics`).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polytask.train.flat_config import Norm

TINY = 1e-12  # added to norms: a task with zero gradient gets a zero perturbation, not NaN


@contextmanager
def perturbed(parameters: Sequence[Tensor], offsets: Sequence[Tensor]) -> Iterator[None]:
    """Add `offsets` to `parameters` inside the block; afterwards the saved values are copied back.

    The restored values are the old ones bit for bit, also when the block raises.
    """
    saved = [parameter.detach().clone() for parameter in parameters]
    try:
        with torch.no_grad():
            for parameter, offset in zip(parameters, offsets, strict=True):
                parameter.add_(offset)
        yield
    finally:
        with torch.no_grad():
            for parameter, old in zip(parameters, saved, strict=True):
                parameter.copy_(old)


def ascent(
    groups: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]],
    rho: float,
    adaptive: bool = False,
    norm: Norm = "joint",
) -> list[list[Tensor]]:
    """The step to the worst point within `rho`, to first order, one list of offsets per group.

    `groups` holds (values, gradients) pairs: usually the shared parameters and the task's head.

        plain      eps = rho * g / ||g||
        adaptive   eps = rho * v^2 * g / || |v| * g ||    (ASAM, Kwon et al. 2021, arXiv 2102.11600)

    `norm="joint"` takes one norm over all groups, `"split"` gives each group its own norm and
    therefore its own radius. A zero gradient gives a zero offset.
    """
    scaled = [
        [v.abs() * g if adaptive else g for v, g in zip(values, gradients, strict=True)]
        for values, gradients in groups
    ]
    norms = [global_norm(part) for part in scaled]
    if norm == "joint" and norms:
        norms = [torch.stack(norms).norm()] * len(norms)
    offsets = []
    for (values, gradients), size in zip(groups, norms, strict=True):
        factor = rho / (size + TINY)
        offsets.append(
            [
                (v * v * g if adaptive else g) * factor.to(g.device)
                for v, g in zip(values, gradients, strict=True)
            ]
        )
    return offsets


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all entries together, in at least float32; 0 for no tensors."""
    if not tensors:
        return torch.zeros(())
    parts = [
        torch.linalg.vector_norm(t if t.dtype == torch.float64 else t.float()) for t in tensors
    ]
    together = torch.stack([part.to(parts[0].device) for part in parts])
    total: Tensor = torch.linalg.vector_norm(together)
    return total


@contextmanager
def frozen_statistics(model: nn.Module | None) -> Iterator[None]:
    """Leave the running statistics of batch and instance normalisation as they are.

    Batches are still normalised by their own statistics in training mode; only the buffers, which
    serve evaluation, are put back. `None` does nothing.
    """
    buffers = [] if model is None else list(_running_statistics(model))
    saved = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, old in zip(buffers, saved, strict=True):
                buffer.copy_(old)


def _running_statistics(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.training:
            yield from module.buffers(recurse=False)


@dataclass(frozen=True)
class RandomState:
    """Where all global generators stand, so that a forward pass can be repeated exactly.

    Covers torch on the CPU and on the accelerators named, `random` and `numpy.random`, since
    dropout and augmentation may draw from any of them.
    """

    cpu: Tensor
    accelerators: tuple[tuple[torch.device, Tensor], ...]
    python: Any
    numpy: Any

    @classmethod
    def capture(cls, devices: Iterable[torch.device] = ()) -> RandomState:
        """The present state; `devices` are those whose generators matter beside the CPU's."""
        others = sorted({d for d in devices if d.type != "cpu"}, key=str)
        return cls(
            torch.get_rng_state(),
            tuple((d, torch.get_device_module(d).get_rng_state(d)) for d in others),
            random.getstate(),
            np.random.get_state(),  # noqa: NPY002 - other people's code draws from it
        )

    def restore(self) -> None:
        """Put every generator back to where it stood."""
        torch.set_rng_state(self.cpu)
        for device, state in self.accelerators:
            torch.get_device_module(device).set_rng_state(state, device)
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002
